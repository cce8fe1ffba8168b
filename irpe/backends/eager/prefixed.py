"""What spreads of ordered tokens share: prefix tokens, whose pairs have the last bucket."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .tiles import Tile


class Prefixed:
    """Leaves pairs without a prefix token to ``_write`` and ``_sum``.

    Args:
        size: N. prefix, key_prefix: tokens ahead of the queries and of the keys; the pattern gives
            such queries tiles of their own.
    """

    def __init__(self, size: int, prefix: int, key_prefix: int) -> None:
        self.size, self.prefix, self.key_prefix = size, prefix, key_prefix

    def write(self, out: Tensor, numbers: Tensor, tile: Tile) -> None:
        rows = numbers[tile.lead, tile.rows]
        ahead = self._ahead(tile)
        if ahead:
            out[..., :ahead] = rows[..., -1:]
        if ahead < tile.count:
            self._write(out[..., ahead:], rows, tile)

    def sum(self, x: Tensor, tile: Tile) -> Tensor:
        sums = x.new_zeros(*x.shape[:2], self.size)
        ahead = self._ahead(tile)
        if ahead:
            sums[..., -1] = x[..., :ahead].sum(-1)
        if ahead < tile.count:
            self._sum(sums, x[..., ahead:], tile)
        return sums

    def _ahead(self, tile: Tile) -> int:
        """How many keys of a tile, from the first one on, have the last bucket."""
        if tile.rows.start < self.prefix:
            return tile.count
        return min(self.key_prefix, tile.count)

    def _write(self, out: Tensor, rows: Tensor, tile: Tile) -> None:
        raise NotImplementedError

    def _sum(self, sums: Tensor, x: Tensor, tile: Tile) -> None:
        raise NotImplementedError


def ends(seen: Tensor) -> tuple[int, int]:
    """The first and past the last True; 0 and 1 where there is none, so that no box is empty."""
    where = seen.nonzero()
    return (int(where[0]), int(where[-1]) + 1) if len(where) else (0, 1)
