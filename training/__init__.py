"""What the training scripts share: configuration, data, the loop, run directories, pictures.

Not part of the ``irpe`` package: the scripts import it from the repository's root.
"""
