"""DETR (Carion et al., ECCV 2020) whose encoder takes relative positions (Wu et al., ICCV 2021).

Names and shapes are the original's: released checkpoints load with ``load_state_dict``.

A name is imported when it is first used: the transformer alone needs no torchvision.
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
