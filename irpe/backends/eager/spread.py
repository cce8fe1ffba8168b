"""How a row of numbers, one for each bucket, spreads over a tile, and how a tile is summed up.

Rows belong to queries; to keys where the table meets the key. A pattern says what the places of
the tokens have in common, and with it what is the fastest spread that is right for a term.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ...buckets import BucketIds

if TYPE_CHECKING:
    from .tiles import Tile


@dataclass(frozen=True, slots=True, eq=False)
class Keys:
    """The keys that a part of a call goes over.

    Args:
        index: which ones, ascending; None for all. hidden: those among them that are not seen.
        box: of a grid: rows and columns, of a line: keys, from the first to past the last.
        notes: what spreads have found out about them.
    """

    index: Tensor | None = None
    hidden: Tensor | None = None
    box: tuple[int, ...] = ()
    notes: dict[Spread, Any] = field(default_factory=dict)

    def take(self, x: Tensor) -> Tensor:
        """``[n, S, D]`` -> ``[n, keys, D]``."""
        return x if self.index is None else x.index_select(1, self.index)

    def put(self, out: Tensor, x: Tensor) -> None:
        """The reverse of take."""
        if self.index is None:
            out.copy_(x)
        else:
            out.index_copy_(1, self.index, x)


class Spread(Protocol):
    """Reads ``[N]`` numbers of a token at the buckets of its pairs, and the reverse.

    ``size`` is N. Rows of queries are ``[B * H, L, N]``; rows of keys are laid out once for all
    tiles that go over the same keys.
    """

    size: int

    def write(self, out: Tensor, numbers: Tensor, tile: Tile) -> None:
        """``out[n, i, j] = numbers[n, i, id(i, j)]``, out ``[n, rows, keys]``."""

    def sum(self, x: Tensor, tile: Tile) -> Tensor:
        """The reverse: x summed by query and bucket, ``[n, rows, N]``."""

    def lay(self, numbers: Tensor, keys: Keys) -> tuple[Tensor, ...]:
        """Rows ``[n, keys, N]`` of keys in the form that ``write_laid`` reads."""

    def write_laid(self, out: Tensor, laid: tuple[Tensor, ...], tile: Tile) -> None:
        """``out[n, i, j] = numbers[n, j, id(i, j)]``."""

    def add_laid(self, sums: tuple[Tensor, ...], x: Tensor, tile: Tile) -> None:
        """The reverse: x is added to sums of the same form."""

    def lift(self, sums: tuple[Tensor, ...], keys: Keys) -> Tensor:
        """The reverse of lay."""


class Pattern:
    """Tokens anywhere.

    ``unit``: how many queries belong together. ``prefix``: how many have tiles of their own.
    """

    unit, prefix = 1, 0

    def keys(self, seen: Tensor | None) -> Keys:
        """The keys to go over where ``seen [S]`` are visible, at least one of them."""
        return Keys() if seen is None or bool(seen.all()) else Keys(seen.nonzero().squeeze(1))

    def spread(
        self, buckets: BucketIds, owner: str, device: torch.device
    ) -> tuple[Hashable, Callable[[], Spread], Tensor | None]:
        """How buckets spread; terms of equal keys share what is made.

        Returns:
            A key, what makes the spread, and the id in the term's table for each of its N.
        """
        key = (buckets.function, buckets.by_key, id(buckets.geometry))
        return key, lambda: Gathered(buckets, device), None


class Gathered:
    """By the map of all ids: right for every geometry and bucket function."""

    def __init__(self, buckets: BucketIds, device: torch.device) -> None:
        self.size = buckets.size
        self.ids = buckets.dense(device)

    def write(self, out: Tensor, numbers: Tensor, tile: Tile) -> None:
        rows = numbers[tile.lead, tile.rows].unflatten(0, tile.shape[:2])
        torch.gather(rows, -1, self._index(tile), out=out.view(tile.shape))

    def sum(self, x: Tensor, tile: Tile) -> Tensor:
        sums = x.new_zeros(*tile.shape[:3], self.size)
        return sums.scatter_add_(-1, self._index(tile), x.view(tile.shape)).flatten(0, 1)

    def lay(self, numbers: Tensor, keys: Keys) -> tuple[Tensor, ...]:
        return (numbers.transpose(1, 2).contiguous(),)

    def write_laid(self, out: Tensor, laid: tuple[Tensor, ...], tile: Tile) -> None:
        rows = laid[0][..., : tile.count].unflatten(0, tile.shape[:2])
        torch.gather(rows, -2, self._index(tile), out=out.view(tile.shape))

    def add_laid(self, sums: tuple[Tensor, ...], x: Tensor, tile: Tile) -> None:
        own = sums[0][..., : tile.count].unflatten(0, tile.shape[:2])
        own.scatter_add_(-2, self._index(tile), x.view(tile.shape))

    def lift(self, sums: tuple[Tensor, ...], keys: Keys) -> Tensor:
        return sums[0].transpose(1, 2)

    def _index(self, tile: Tile) -> Tensor:
        ids, index = self.ids[..., tile.rows, :], tile.keys.index
        if ids.dim() == 3:
            ids = ids[tile.images].unsqueeze(1)
        ids = ids[..., : tile.count] if index is None else ids.index_select(-1, index)
        return ids.expand(tile.shape)
