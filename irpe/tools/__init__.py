"""The ``irpe`` command, pictures, costs."""
