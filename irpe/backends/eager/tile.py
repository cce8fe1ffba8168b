"""What goes through the cache together: some queries, and the keys that they meet."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Keys:
    """The keys that a part of a call goes over.

    Args:
        count: how many. index: which ones, ascending; None for all. hidden: those among them that
            are not seen.
        box: of a grid: rows and columns, of a line: keys, from the first to past the last.
        notes: what spreads have found out about them.
    """

    count: int
    index: Tensor | None = None
    hidden: Tensor | None = None
    box: tuple[int, ...] = ()
    notes: dict[Any, Any] = field(default_factory=dict)

    def take(self, x: Tensor) -> Tensor:
        """``[n, S, D]`` -> ``[n, keys, D]``."""
        return x if self.index is None else x.index_select(1, self.index)

    def put(self, out: Tensor, x: Tensor) -> None:
        """The reverse of take."""
        if self.index is None:
            out.copy_(x)
        else:
            out.index_copy_(1, self.index, x)


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """Some queries of some images and heads, and the keys that they meet.

    Args:
        images, heads, rows: of ``[B, H, L]``. lead: images and heads in ``[B * H]``.
        keys: of the part. count: how many of them, from the first one on.
        shape: ``(images, heads, rows, count)``.
    """

    images: slice
    heads: slice
    lead: slice
    rows: slice
    keys: Keys
    count: int
    shape: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Images and heads that go over the same keys together, and their tiles."""

    lead: slice
    keys: Keys
    tiles: list[Tile]
