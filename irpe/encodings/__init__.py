"""Encodings as modules: four hooks into a model, and a builder for any spec."""

from .absolute import stretch
from .base import Encoding, Hooks, hooks
from .build import build
from .image import build_rpe

__all__ = [
    "Encoding",
    "Hooks",
    "build",
    "build_rpe",
    "hooks",
    "stretch",
]
