"""What people look at: the ``irpe`` command, pictures, costs, checkpoints."""
