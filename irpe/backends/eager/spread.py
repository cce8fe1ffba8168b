"""How rows of numbers, one for each bucket, spread over a tile, and how a tile is summed up.

The rows belong to queries, or to keys where the table meets the key. A pattern says what the places
of the tokens have in common, and with it what is the fastest spread that is right for a term.
"""

from collections.abc import Callable, Hashable
from typing import Protocol

import torch
from torch import Tensor

from ...buckets import BucketIds
from .tile import Keys, Tile

Laid = tuple[Tensor, ...]


class Spread(Protocol):
    """Reads the ``[N]`` numbers of a token at the buckets of its pairs, and the reverse.

    ``size`` is N. The rows of numbers are laid out once for all tiles of a part.
    """

    size: int

    def lay(self, numbers: Tensor, keys: Keys) -> Laid:
        """Rows ``[n, L | keys, N]`` in the form that write reads."""

    def write(self, out: Tensor, laid: Laid, tile: Tile) -> None:
        """``out[n, i, j] = numbers[n, owner, id(i, j)]``, out ``[n, rows, keys]``."""

    def blank(self, like: Tensor, n: int, keys: Keys) -> Laid:
        """Rows of zeros, or of anything that add writes over, laid out likewise."""

    def add(self, sums: Laid, x: Tensor, tile: Tile) -> None:
        """The reverse of write: x is added to sums, each tile once."""

    def lift(self, sums: Laid, keys: Keys, out: Tensor) -> None:
        """The reverse of lay: sums are added to rows ``[n, L | keys, N]`` of zeros."""


class Pattern:
    """Tokens anywhere.

    ``unit``: how many queries belong together. ``prefix``: how many have tiles of their own.
    """

    unit, prefix = 1, 0

    def keys(self, seen: Tensor) -> Keys:
        """The keys to go over where ``seen [S]`` are visible, not all of them but one at least."""
        index = seen.nonzero().squeeze(1)
        return Keys(len(index), index)

    def spread(
        self, buckets: BucketIds, owner: str, device: torch.device
    ) -> tuple[Hashable, Callable[[], Spread], Tensor | None]:
        """How buckets spread; terms of equal keys share what is made.

        Returns:
            A key, what makes the spread, and the id in the term's table for each of its N.
        """
        key = (buckets.function, buckets.by_key, id(buckets.geometry))
        kind = GatheredByKey if owner == "key" else Gathered
        return key, lambda: kind(buckets, device), None


class Gathered:
    """By the map of all ids: right for every geometry and bucket function."""

    axis = -1

    def __init__(self, buckets: BucketIds, device: torch.device) -> None:
        self.size = buckets.size
        self.ids = buckets.dense(device)

    def lay(self, numbers: Tensor, keys: Keys) -> Laid:
        return (numbers,)

    def blank(self, like: Tensor, n: int, keys: Keys) -> Laid:
        return (like.new_zeros(n, self.ids.shape[-2], self.size),)

    def write(self, out: Tensor, laid: Laid, tile: Tile) -> None:
        rows = self._own(laid[0], tile).unflatten(0, tile.shape[:2])
        torch.gather(rows, self.axis, self._index(tile), out=out.view(tile.shape))

    def add(self, sums: Laid, x: Tensor, tile: Tile) -> None:
        rows = self._own(sums[0], tile).unflatten(0, tile.shape[:2])
        rows.scatter_add_(self.axis, self._index(tile), x.view(tile.shape))

    def lift(self, sums: Laid, keys: Keys, out: Tensor) -> None:
        out.copy_(sums[0])

    def _own(self, laid: Tensor, tile: Tile) -> Tensor:
        return laid[:, tile.rows]

    def _index(self, tile: Tile) -> Tensor:
        ids, index = self.ids[..., tile.rows, :], tile.keys.index
        if ids.dim() == 3:
            ids = ids[tile.images].unsqueeze(1)
        ids = ids[..., : tile.count] if index is None else ids.index_select(-1, index)
        return ids.expand(tile.shape)


class GatheredByKey(Gathered):
    """The same for rows of keys, laid out as columns ``[n, N, keys]``."""

    axis = -2

    def lay(self, numbers: Tensor, keys: Keys) -> Laid:
        return (numbers.transpose(1, 2).contiguous(),)

    def blank(self, like: Tensor, n: int, keys: Keys) -> Laid:
        return (like.new_zeros(n, self.size, keys.count),)

    def lift(self, sums: Laid, keys: Keys, out: Tensor) -> None:
        out.copy_(sums[0].transpose(1, 2))

    def _own(self, laid: Tensor, tile: Tile) -> Tensor:
        return laid[..., : tile.count]
