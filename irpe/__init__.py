"""Relative position encodings for vision transformers, and for texts.

Data flows one way: geometry -> buckets -> terms -> attention. See ``irpe.parse`` for specs,
``irpe.Grid`` and ``irpe.Sequence`` for geometry, ``irpe.attention`` for the function,
``irpe.RPEAttention`` for a layer, ``irpe.build`` and ``irpe.hooks`` for one of your own, and
``irpe.attach`` to equip a model that exists already.

A name is imported when it is first used (PEP 562): ``irpe --help`` does without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .buckets import bucket_ids
    from .encodings import Encoding, build, build_rpe, hooks, stretch
    from .errors import IrpeError
    from .functional import attention, explain, lookup
    from .geometry import Geometry, Grid, Sequence
    from .hosts import attach, detach, located, param_groups
    from .layers import RPEAttention
    from .linear import LinearState, linear_attention, linear_step
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

# Where the names above live; the same as the imports that a type checker reads.
_HOMES = {
    "buckets": ("bucket_ids",),
    "encodings": ("Encoding", "build", "build_rpe", "hooks", "stretch"),
    "errors": ("IrpeError",),
    "functional": ("attention", "explain", "lookup"),
    "geometry": ("Geometry", "Grid", "Sequence"),
    "hosts": ("attach", "detach", "located", "param_groups"),
    "layers": ("RPEAttention",),
    "linear": ("LinearState", "linear_attention", "linear_step"),
    "spec": ("RPE", "Spec", "parse"),
    "terms": ("Term",),
}
_PARTS = {*_HOMES, "backends"}


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return import_module(f".{name}", __name__)
    for home, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f".{home}", __name__), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PARTS})
