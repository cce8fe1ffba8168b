"""Encodings as modules: tables with a spec, three hooks into attention."""

from .base import Encoding
from .image import build_rpe

__all__ = ["Encoding", "build_rpe"]
