"""DETR (Carion et al., ECCV 2020) whose encoder may know relative positions (Wu et al., ICCV 2021).

Names and shapes are the original's, so released checkpoints load with a plain ``load_state_dict``.
"""

from .backbone import Backbone
from .criterion import Criterion
from .matcher import HungarianMatcher
from .model import DETR, build_detr, detections
from .positions import LearnedPositions, SinePositions
from .transformer import Transformer

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
