"""Code that the training scripts share: configuration, data, loop, run directories, pictures.

It is not part of the ``irpe`` package: the scripts import it from the repository's root.
"""
