"""Relative position encodings for vision transformers, and for text.

Data flow: geometry -> buckets -> terms -> attention. See ``irpe.parse`` for specs, ``irpe.Grid``,
``irpe.Volume`` and ``irpe.Sequence`` for geometry, ``irpe.attention`` for the function,
``irpe.RPEAttention`` for a layer, ``irpe.build`` and ``irpe.encodings_of`` for your own layer, and
``irpe.attach`` to add an encoding to an existing model.

Names are imported at first use (PEP 562), so that ``irpe --help`` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import fields, linear
    from .backends import Call, register_backend
    from .buckets import BucketIds
    from .cache import clear_cache
    from .encodings import (
        RPE,
        Encoding,
        bucket_ids,
        build,
        build_rpe,
        encodings_of,
        interpolate,
        parse,
        register,
        specs,
    )
    from .errors import IrpeError
    from .files import Loaded, load, save
    from .functional import attention, explain, lookup
    from .geometry import Geometry, Grid, Sequence, Volume
    from .groups import param_groups
    from .hosts import Site, attach, attention_maps, detach, located, register_host
    from .layers import RPEAttention
    from .spec import LayerSize, Spec
    from .terms import Term

__version__ = "0.2.0"

# Modules and their public names. The imports above are for type checkers.
_HOMES = {
    "backends": ("Call", "register_backend"),
    "buckets": ("BucketIds",),
    "cache": ("clear_cache",),
    "encodings": (
        "RPE",
        "Encoding",
        "bucket_ids",
        "build",
        "build_rpe",
        "encodings_of",
        "interpolate",
        "parse",
        "register",
        "specs",
    ),
    "errors": ("IrpeError",),
    "fields": (),
    "files": ("Loaded", "load", "save"),
    "functional": ("attention", "explain", "lookup"),
    "geometry": ("Geometry", "Grid", "Sequence", "Volume"),
    "groups": ("param_groups",),
    "hosts": ("Site", "attach", "attention_maps", "detach", "located", "register_host"),
    "layers": ("RPEAttention",),
    "linear": (),
    "spec": ("LayerSize", "Spec"),
    "terms": ("Term",),
}

__all__ = sorted(["fields", "linear", *(name for names in _HOMES.values() for name in names)])


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return import_module(f".{name}", __name__)
    for home, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f".{home}", __name__), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_HOMES})
