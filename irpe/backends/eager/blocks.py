"""Gather and scatter-add by blocks: the pairs of a row of queries and a row of keys.

Blocks repeat, so numbers are gathered once for each different block, and tiles are copied from
them.
"""

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .gather import put
from .rows import Both, Layout
from .tile import Tile


class Blocks:
    """Gather and scatter, see ``ByMap``; pairs with a prefix token have the last bucket.

    Args:
        layout: layout of the tokens.
        blocks: the result of ``layout.blocks``.
        of_key: whether rows of numbers belong to keys.
        tile: a tile of the part.
    """

    def __init__(self, layout: Layout, blocks: Both, of_key: bool, tile: Tile) -> None:
        (ids, which), self.of_key, self.index = blocks, of_key, tile.index
        self.prefix, self.key_prefix = layout.prefix, layout.key_prefix
        self.own, self.ahead = layout.query, self.prefix
        if of_key:
            self.own, self.ahead = layout.key, self.key_prefix
        self.wide = layout.query.shape[1]
        top, bottom, left, right = tile.box or (0, layout.key.shape[0], 0, layout.key.shape[1])
        self.rows, self.columns, self.width = slice(top, bottom), slice(left, right), right - left
        ids = ids[..., self.columns] if ids.shape[2] > 1 else ids
        self.ids = ids.expand(-1, -1, self.width) if of_key else ids.expand(-1, self.wide, -1)
        which = which[:, self.rows]
        # The index of the gathered block of each row of queries and row of keys.
        owner = torch.arange(which.shape[1]) if of_key else torch.arange(len(which)).unsqueeze(1)
        at = owner * len(ids) + which
        if len(ids) == 1:
            at = at[:1] if of_key else at[:, :1]
        self.at = at
        # By tile: indices of its runs, and by their id() what sums runs of equal index.
        self.runs: dict[tuple[int, ...], Tensor] = {}
        self.orders: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def read(self, numbers: Tensor) -> None:
        own = self._boxed(self.own.full(numbers[:, self.ahead :]))
        n, rows = own.shape[:2]
        own = own.transpose(2, 3) if self.of_key else own
        own = own.unsqueeze(2).expand(-1, -1, len(self.ids), -1, -1)
        blocks = own.gather(3 if self.of_key else 4, self.ids.expand(n, rows, -1, -1, -1))
        self.numbers, self.last = blocks.flatten(1, 2), self._last(numbers)

    def gather(self, out: Tensor, tile: Tile, add: bool) -> None:
        runs = self._runs(out, self.numbers, tile)
        if runs is not None:
            space = torch.empty_like(out) if add else out
            numbers = self.numbers.view(-1, self.width)
            torch.index_select(numbers, 0, runs, out=space.view(-1, self.width))
            if add:
                out += space
            return
        ahead, last = self._ahead(tile), self.last
        if ahead:
            last = last[:, None, :ahead] if self.of_key else last[:, tile.rows, None]
            put(out[..., :ahead], last, add)
        for x, own, at in self._pieces(out, self.numbers, tile, ahead):
            put(x, own.index_select(1, at.flatten()).unflatten(1, at.shape), add)

    def write(self, total: Tensor) -> None:
        lines = self.at.shape[1 if self.of_key else 0]
        self.sums = total.new_zeros(len(total), lines * len(self.ids), *self.ids.shape[1:])
        self.total, self.last_sums = total, torch.zeros_like(self._last(total))

    def scatter(self, x: Tensor, tile: Tile) -> None:
        runs = self._runs(x, self.sums, tile)
        if runs is not None:
            if id(runs) not in self.orders:
                order = runs.argsort(stable=True)
                indices, counts = torch.unique_consecutive(runs[order], return_counts=True)
                self.orders[id(runs)] = order, counts.cumsum(0) - counts, indices
            order, starts, indices = self.orders[id(runs)]
            sums = F.embedding_bag(order, x.view(-1, self.width), starts, mode="sum")
            self.sums.view(-1, self.width).index_add_(0, indices, sums)
            return
        ahead, last = self._ahead(tile), self.last_sums
        if ahead and self.of_key:
            last[:, :ahead] += x[..., :ahead].sum(1)
        elif ahead:
            last[:, tile.rows] += x[..., :ahead].sum(-1)
        for some, own, at in self._pieces(x, self.sums, tile, ahead):
            shape = (len(some), *at.shape, *own.shape[2:])
            if some.shape == shape:
                for one, places in zip(some.unbind(1), at, strict=True):
                    own.index_add_(1, places, one)
            else:
                some = some.sum_to_size(shape).flatten(1, 2)
                own.scatter_add_(1, at.view(1, -1, 1, 1).expand_as(some), some)

    def collect(self) -> None:
        total, last = self.total, self.last_sums
        order = (2, 0, 1) if self.of_key else (1, 0, 2)  # owning tokens, blocks, other tokens
        x = self.sums.unflatten(1, (-1, len(self.ids)))
        x = x.permute(0, 1, *(2 + axis for axis in order)).flatten(3)
        index = self.ids.permute(order).flatten(1).expand(*x.shape[:2], -1, -1)
        inside = total[:, self.ahead :]
        full = self.own.full(inside)
        self._boxed(full).scatter_add_(3, index, x)
        if full.data_ptr() != inside.data_ptr():  # a copy with a padded last row
            inside.copy_(full.flatten(1, 2)[:, : self.own.count])
        if self.index is not None and self.of_key:
            total[..., -1].index_add_(1, self.index, last)
        else:
            total[..., -1] += last

    def _boxed(self, full: Tensor) -> Tensor:
        """Return complete rows ``[n, height, width, ...]`` without keys outside the box."""
        return full[:, self.rows, self.columns] if self.of_key else full

    def _last(self, numbers: Tensor) -> Tensor:
        """Return the numbers of the last bucket."""
        last = numbers[..., -1]
        return last.index_select(1, self.index) if self.of_key and self.index is not None else last

    def _ahead(self, tile: Tile) -> int:
        """Return the number of first keys of a tile that have the last bucket."""
        return tile.count if tile.rows.start < self.prefix else min(self.key_prefix, tile.count)

    def _runs(self, x: Tensor, blocks: Tensor, tile: Tile) -> Tensor | None:
        """Return the index in ``blocks`` of each run of a tile; a run is a row of a block.

        None where x has incomplete blocks or is not contiguous.
        """
        wide, (n, count, *size) = self.wide, blocks.shape
        first, last = tile.rows.start - self.prefix, tile.rows.stop - self.prefix
        if self._ahead(tile) or first % wide or last % wide or tile.count % self.width:
            return None
        if len(self.ids) == 1 or size != [wide, self.width] or not x.is_contiguous():
            return None
        key = (n, first, last, tile.count)
        if key not in self.runs:
            at = self.at[first // wide : last // wide, : tile.count // self.width].unsqueeze(1)
            at = (at * wide + torch.arange(wide).unsqueeze(1)).flatten()
            at = (at + torch.arange(n).unsqueeze(1) * (count * wide)).flatten()
            self.runs[key] = at
        return self.runs[key]

    def _pieces(
        self, x: Tensor, blocks: Tensor, tile: Tile, ahead: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield parts of x ``[n, rows, key rows, width, key width]``, blocks and their indices.

        Axes of the blocks and indices along which numbers repeat have size 1.
        """
        wide, keys = self.wide, tile.count - ahead
        first, last = tile.rows.start - self.prefix, tile.rows.stop - self.prefix
        # Complete rows, and incomplete ones around them.
        start = min(-(-first // wide) * wide, last)
        stop, whole = max(last // wide * wide, start), keys - keys % self.width
        rows = ((first, start), (start, stop), (stop, last))
        for (begin, end), (left, right) in itertools.product(rows, ((0, whole), (whole, keys))):
            if begin < end and left < right:
                high, long = min(wide, end - begin), min(self.width, right - left)
                some = x[:, begin - first : end - first, ahead + left : ahead + right]
                some = some.unflatten(2, (-1, long)).unflatten(1, (-1, high)).transpose(2, 3)
                own = _some(_some(blocks, 2, begin % wide, high), 3, 0, long)
                at = _some(self.at, 0, begin // wide, some.shape[1])
                yield some, own, _some(at, 1, left // self.width, some.shape[2])


def _some(x: Tensor, axis: int, start: int, length: int) -> Tensor:
    """Narrow an axis, unless its size is 1."""
    return x if x.shape[axis] == 1 else x.narrow(axis, start, length)
