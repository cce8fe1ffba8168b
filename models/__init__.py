"""Complete models, as examples and for training; not part of the wheel."""
