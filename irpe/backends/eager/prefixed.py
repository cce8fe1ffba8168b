"""What spreads of ordered tokens share: prefix tokens, whose pairs have the last bucket."""

import torch
from torch import Tensor

from .spread import Laid
from .tile import Keys, Tile


class Prefixed:
    """Adds, as the last of what is laid out, each owner's number ``[n, L | keys]`` in that bucket.

    Args:
        size: N. prefix, key_prefix: tokens ahead of the queries and of the keys; the pattern gives
            such queries tiles of their own. by_key: the rows are the keys'.
    """

    def __init__(self, size: int, prefix: int, key_prefix: int, by_key: bool = False) -> None:
        self.size, self.prefix, self.key_prefix, self.by_key = size, prefix, key_prefix, by_key

    def lay(self, numbers: Tensor, keys: Keys) -> Laid:
        return self._lay(numbers, keys), numbers[..., -1]

    def blank(self, like: Tensor, n: int, keys: Keys) -> Laid:
        inner = self._blank(like, n, keys)
        return inner, like.new_zeros(n, keys.count if self.by_key else self._queries())

    def write(self, out: Tensor, laid: Laid, tile: Tile) -> None:
        ahead = self._ahead(tile)
        if ahead:
            last = laid[1].unsqueeze(1) if self.by_key else laid[1][:, tile.rows, None]
            out[..., :ahead] = last[..., :ahead]
        if ahead < tile.count:
            self._write(out[..., ahead:] if ahead else out, laid[0], tile)

    def add(self, sums: Laid, x: Tensor, tile: Tile) -> None:
        ahead = self._ahead(tile)
        if ahead and self.by_key:
            sums[1][:, :ahead] += x[..., :ahead].sum(1)
        elif ahead:
            sums[1][:, tile.rows] = x[..., :ahead].sum(-1)
        if ahead < tile.count:
            self._add(sums[0], x[..., ahead:] if ahead else x, tile)

    def lift(self, sums: Laid, keys: Keys, out: Tensor) -> None:
        self._lift(sums[0], keys, out)
        if self.prefix or self.key_prefix:
            out[..., -1] += sums[1]

    def _ahead(self, tile: Tile) -> int:
        """How many keys of a tile, from the first one on, have the last bucket."""
        if tile.rows.start < self.prefix:
            return tile.count
        return min(self.key_prefix, tile.count)

    def _queries(self) -> int:
        raise NotImplementedError

    def _lay(self, numbers: Tensor, keys: Keys) -> Tensor:
        raise NotImplementedError

    def _blank(self, like: Tensor, n: int, keys: Keys) -> Tensor:
        raise NotImplementedError

    def _write(self, out: Tensor, laid: Tensor, tile: Tile) -> None:
        raise NotImplementedError

    def _add(self, sums: Tensor, x: Tensor, tile: Tile) -> None:
        raise NotImplementedError

    def _lift(self, sums: Tensor, keys: Keys, out: Tensor) -> None:
        raise NotImplementedError


def around(seen: Tensor, prefix: int, inside: Tensor, box: tuple[int, ...]) -> Keys:
    """All prefix tokens, and of the others those inside a box."""
    index = torch.cat((torch.ones_like(seen[:prefix]), inside)).nonzero().squeeze(1)
    hidden = ~seen[index]
    return Keys(len(index), index, hidden if bool(hidden.any()) else None, box)


def ends(seen: Tensor) -> tuple[int, int]:
    """The first and past the last True; 0 and 1 where there is none, so that no box is empty."""
    where = seen.nonzero()
    return (int(where[0]), int(where[-1]) + 1) if len(where) else (0, 1)
