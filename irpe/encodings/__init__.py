"""Encodings: each file has the spec and the module of one, and buckets that only it uses."""

# Each import registers the specs of a file; ``irpe specs`` lists them in this order.
from . import rpe, rope, rope_axial, rope_mixed, alibi, cpb, decomposed, lookhere  # noqa: I001, F401
from . import t5, t5_axes, shaw, huang, sinusoidal, learned, pia  # noqa: F401
from .base import (
    SPECS,
    Encoding,
    Encodings,
    bucket_ids,
    build,
    encodings_of,
    parse,
    register,
    specs,
)
from .learned import interpolate
from .rpe import RPE, build_rpe

__all__ = [
    "RPE",
    "SPECS",
    "Encoding",
    "Encodings",
    "bucket_ids",
    "build",
    "build_rpe",
    "encodings_of",
    "interpolate",
    "parse",
    "register",
    "specs",
]
