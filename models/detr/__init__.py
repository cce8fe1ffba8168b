"""DETR (Carion et al., ECCV 2020) with relative positions in its encoder (Wu et al., ICCV 2021).

Released checkpoints load with ``load_state_dict``: names and shapes are the same.

Names are imported at first use, so that the transformer does not need torchvision.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backbone import Backbone
    from .criterion import Criterion
    from .matcher import HungarianMatcher
    from .model import DETR, build_detr, detections
    from .positions import LearnedPositions, SinePositions
    from .transformer import Transformer

_HOMES = {
    "Backbone": "backbone",
    "Criterion": "criterion",
    "DETR": "model",
    "HungarianMatcher": "matcher",
    "LearnedPositions": "positions",
    "SinePositions": "positions",
    "Transformer": "transformer",
    "build_detr": "model",
    "detections": "model",
}
__all__ = [
    "DETR",
    "Backbone",
    "Criterion",
    "HungarianMatcher",
    "LearnedPositions",
    "SinePositions",
    "Transformer",
    "build_detr",
    "detections",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
