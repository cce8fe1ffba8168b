"""Relative position encodings for vision transformers, and for texts.

Data flows one way: geometry -> buckets -> terms -> attention. See ``irpe.parse`` for specs,
``irpe.Grid`` and ``irpe.Sequence`` for geometry, ``irpe.attention`` for the function,
``irpe.RPEAttention`` for a layer, ``irpe.build`` and ``irpe.hooks`` for one of your own, and
``irpe.attach`` to equip a model that exists already.
"""

from .buckets import bucket_ids
from .encodings import Encoding, build, build_rpe, hooks, stretch
from .errors import IrpeError
from .functional import (
    LinearState,
    attention,
    explain,
    linear_attention,
    linear_step,
    lookup,
)
from .geometry import Geometry, Grid, Sequence
from .hosts import attach, detach, located, param_groups
from .layers import RPEAttention
from .spec import RPE, Spec, parse
from .terms import Term

__version__ = "0.1.0"

__all__ = [
    "Encoding",
    "Geometry",
    "Grid",
    "IrpeError",
    "LinearState",
    "RPE",
    "RPEAttention",
    "Sequence",
    "Spec",
    "Term",
    "attach",
    "attention",
    "bucket_ids",
    "build",
    "build_rpe",
    "detach",
    "explain",
    "hooks",
    "linear_attention",
    "linear_step",
    "located",
    "lookup",
    "param_groups",
    "parse",
    "stretch",
]
