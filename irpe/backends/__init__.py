"""Ways to compute attention with terms. They never import one another."""
