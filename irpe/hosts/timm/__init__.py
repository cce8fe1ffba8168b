"""timm's models."""

from .places import sites

__all__ = ["sites"]
