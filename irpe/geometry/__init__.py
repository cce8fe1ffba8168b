"""Where tokens are: positions of queries and keys, and the prefix tokens before them."""

from .base import Geometry
from .grid import Grid
from .sequence import Sequence

__all__ = ["Geometry", "Grid", "Sequence"]
