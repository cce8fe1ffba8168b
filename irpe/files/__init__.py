"""Save a model with its encodings in one file, and load such files and those of other libraries.

A file of ``irpe.save`` is safetensors. Its metadata has the specs under ``irpe``, a JSON object
``{path: spec}``, and for timm models the arguments that build them under ``irpe_model``.
"""

from .load import Loaded, load
from .save import metadata, save

__all__ = ["Loaded", "load", "metadata", "save"]
