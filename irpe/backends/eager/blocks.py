"""Gather and scatter-add by blocks: the pairs of a row of queries and a row of keys.

Blocks repeat, so numbers are gathered once for each different block, and tiles are copied from
them.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .gather import put
from .rows import Layout, Table
from .tile import Tile

CACHED = 48  # indices of as many tiles: without, images take 1.04 times as long
Space = Callable[[str, Sequence[int]], Tensor]


class Blocks:
    """Gather and scatter, see ``ByMap``; pairs with a prefix token have the last bucket.

    Rows of numbers of queries are gathered for each tile, those of keys once for each part.

    Args:
        layout: layout of the tokens.
        table: the result of ``layout.blocks``.
        of_key: whether rows of numbers belong to keys.
        part: a tile of the part.
        space: function of a name and a shape that returns a buffer. Large blocks that are allocated
            for each part would fragment the heap.
    """

    def __init__(
        self, layout: Layout, table: Table, of_key: bool, part: Tile, space: Space
    ) -> None:
        self.space = space
        (ids, offsets, which), self.of_key = table, of_key
        self.index, self.part = part.index, part.columns
        self.prefix, self.key_prefix = layout.prefix, layout.key_prefix
        self.own, self.ahead = layout.query, self.prefix
        if of_key:
            self.own, self.ahead = layout.key, self.key_prefix
        self.wide = layout.query.shape[1]
        self.start, end = part.columns
        self.count = end - self.start
        top, bottom, left, right = part.box or (0, layout.key.shape[0], 0, layout.key.shape[1])
        self.rows, self.columns, self.width = slice(top, bottom), slice(left, right), right - left
        ids = ids[:, offsets[self.start : end, left:right]] if ids.shape[1] > 1 else ids[..., None]
        self.ids = ids.expand(-1, -1, self.width) if of_key else ids.expand(-1, self.count, -1)
        self.order = (2, 0, 1) if of_key else (1, 0, 2)  # owner columns, blocks, other columns
        self.which, self.line = which[:, self.rows], torch.arange(self.count).unsqueeze(1)
        self.cache: dict[tuple[str | int, ...], Any] = {}

    def read(self, numbers: Tensor) -> None:
        self.last, self.numbers = self._last(numbers), self.own.full(numbers[:, self.ahead :])
        if self.of_key:
            self.blocks = self._gathered(self.numbers[:, self.rows, self.columns])

    def gather(self, out: Tensor, tile: Tile, add: bool) -> None:
        ahead, last = self._ahead(tile), self.last
        if ahead:
            last = last[:, None, :ahead] if self.of_key else last[:, tile.rows, None]
            put(out[..., :ahead], last, add)
        if ahead == tile.count:
            return
        blocks = self.blocks if self.of_key else self._gathered(self._of_tile(self.numbers, tile))
        at = self._cached("at", tile, lambda: self._at(tile))
        if self._complete(out, tile):
            runs = self._cached("runs", tile, lambda: self._runs(at, len(out), blocks.shape[1]))
            space = self.space("runs", out.shape) if add else out
            numbers = blocks.view(-1, self.width)
            torch.index_select(numbers, 0, runs, out=space.view(-1, self.width))
            if add:
                out += space
            return
        for x, own, some in self._pieces(out, blocks, at, tile, ahead):
            put(x, own.index_select(1, some.flatten()).unflatten(1, some.shape), add)

    def write(self, total: Tensor) -> None:
        self.total, self.last_sums = total, torch.zeros_like(self._last(total))
        self.sums = self.own.full(total[:, self.ahead :])
        if self.of_key:
            self.block_sums = self._zeros(total, self.which.shape[1])

    def scatter(self, x: Tensor, tile: Tile) -> None:
        ahead, last = self._ahead(tile), self.last_sums
        if ahead and self.of_key:
            last[:, :ahead] += x[..., :ahead].sum(1)
        elif ahead:
            last[:, tile.rows] += x[..., :ahead].sum(-1)
        if ahead == tile.count:
            return
        complete = self._complete(x, tile)
        if complete and not self.of_key:
            self._add_blocks(self._of_tile(self.sums, tile), self._bags(x, tile))
            return
        at = self._cached("at", tile, lambda: self._at(tile))
        blocks = self.block_sums if self.of_key else self._zeros(x, len(at))
        if complete:
            self._add_runs(x, blocks, at, tile)
        else:
            for some, own, places in self._pieces(x, blocks, at, tile, ahead):
                shape = (len(some), *places.shape, *own.shape[2:])
                if some.shape == shape:
                    for one, where in zip(some.unbind(1), places, strict=True):
                        own.index_add_(1, where, one)
                else:
                    some = some.sum_to_size(shape).flatten(1, 2)
                    own.scatter_add_(1, places.view(1, -1, 1, 1).expand_as(some), some)
        if not self.of_key:
            self._add_blocks(self._of_tile(self.sums, tile), self._by_owner(blocks))

    def collect(self) -> None:
        total, last = self.total, self.last_sums
        if self.of_key:
            self._add_blocks(self.sums[:, self.rows, self.columns], self._by_owner(self.block_sums))
        inside = total[:, self.ahead :]
        if self.sums.data_ptr() != inside.data_ptr():  # a copy with a padded last row
            inside.copy_(self.sums.flatten(1, 2)[:, : self.own.count])
        if not (self.prefix or self.key_prefix):
            return
        if self.index is not None and self.of_key:
            total[..., -1].index_add_(1, self.index, last)
        else:
            total[..., -1] += last

    def _last(self, numbers: Tensor) -> Tensor:
        """Return the numbers of the last bucket."""
        last = numbers[..., -1]
        return last.index_select(1, self.index) if self.of_key and self.index is not None else last

    def _ahead(self, tile: Tile) -> int:
        """Return the number of first keys of a tile that have the last bucket."""
        return tile.count if tile.rows.start < self.prefix else min(self.key_prefix, tile.count)

    def _lines(self, tile: Tile) -> slice:
        """Return the rows of queries that a tile has tokens of."""
        first, last = tile.rows.start - self.prefix, tile.rows.stop - self.prefix
        return slice(first // self.wide, -(-last // self.wide))

    def _of_tile(self, full: Tensor, tile: Tile) -> Tensor:
        """Return the rows of queries of a tile, of ``[n, height, width, N]``."""
        return full[:, self._lines(tile), self.start : self.start + self.count]

    def _at(self, tile: Tile) -> Tensor:
        """Return the index of the block of each row of queries of a tile and row of keys."""
        lines, keys = self._lines(tile), -(-(tile.count - self._ahead(tile)) // self.width)
        which = self.which[lines, :keys]
        owner = torch.arange(keys) if self.of_key else torch.arange(len(which)).unsqueeze(1)
        at = owner * len(self.ids) + which
        if len(self.ids) == 1:
            return at[:1] if self.of_key else at[:, :1]
        return at

    def _cached(self, name: str, tile: Tile, build: Callable[[], Any]) -> Any:
        """Return what was built for a tile; heads and images have equal tiles."""
        nb, nh, rows, count = tile.shape
        key = (name, nb * nh, tile.rows.start, rows, count)
        if key not in self.cache:
            if len(self.cache) == CACHED:
                self.cache.clear()
            self.cache[key] = build()
        return self.cache[key]

    def _gathered(self, rows: Tensor) -> Tensor:
        """Return blocks ``[n, rows * different blocks, width, key width]`` of rows of numbers."""
        rows = rows.transpose(2, 3) if self.of_key else rows
        rows = rows.unsqueeze(2).expand(-1, -1, len(self.ids), -1, -1)
        ids = self.ids.expand(*rows.shape[:2], -1, -1, -1)
        out = self.space("blocks", ids.shape)
        return torch.gather(rows, 3 if self.of_key else 4, ids, out=out).flatten(1, 2)

    def _zeros(self, x: Tensor, rows: int) -> Tensor:
        shape = (len(x), rows * len(self.ids), *self.ids.shape[1:])
        return self.space("sums", shape).zero_()

    def _by_owner(self, blocks: Tensor) -> Tensor:
        """Return blocks as ``[n, owner rows, owner columns, different blocks * other columns]``."""
        x = blocks.unflatten(1, (-1, len(self.ids)))
        return x.permute(0, 1, *(2 + axis for axis in self.order)).flatten(3)

    def _add_blocks(self, rows: Tensor, x: Tensor) -> None:
        """Add blocks by owner to the rows of numbers that they were gathered from."""
        index = self.ids.permute(self.order).flatten(1).expand(*x.shape[:2], -1, -1)
        rows.scatter_add_(3, index, x)

    def _complete(self, x: Tensor, tile: Tile) -> bool:
        """Return whether a tile is contiguous and consists of complete blocks."""
        first, last = tile.rows.start - self.prefix, tile.rows.stop - self.prefix
        lines = self._lines(tile)
        whole = last - first == (lines.stop - lines.start) * self.count
        if self._ahead(tile) or not whole or tile.count % self.width or len(self.ids) == 1:
            return False
        return tuple(self.ids.shape[1:]) == (self.count, self.width) and x.is_contiguous()

    def _runs(self, at: Tensor, n: int, size: int) -> Tensor:
        """Return the index of each run of a tile in ``[n, size, width, ...]``."""
        images = torch.arange(n).view(-1, 1, 1, 1) * (size * self.count)
        return (images + at.unsqueeze(1) * self.count + self.line).flatten()

    def _order(self, at: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the runs of a tile by block and row, the first of each, and the blocks."""
        (rows, keys), wide = at.shape, self.count
        at, order = at.flatten().sort(stable=True)
        indices, counts = torch.unique_consecutive(at, return_counts=True)
        images = torch.arange(n).view(-1, 1, 1) * (rows * keys * wide)
        runs = order // keys * (wide * keys) + order % keys + self.line * keys
        starts = counts.cumsum(0) - counts + self.line * (rows * keys)
        return (images + runs).flatten(), (images + starts).flatten(), indices

    def _bags(self, x: Tensor, tile: Tile) -> Tensor:
        """Return the sums of a tile of complete blocks of queries by owner, see ``_by_owner``."""
        runs, starts = self._cached("bags", tile, lambda: self._by_block(tile, len(x)))
        sums = F.embedding_bag(runs, x.view(-1, self.width), starts, mode="sum")
        return sums.view(len(x), -1, self.count, len(self.ids) * self.width)

    def _by_block(self, tile: Tile, n: int) -> tuple[Tensor, Tensor]:
        """Return the runs of each query sorted by block, and the first of each block."""
        keys = tile.count // self.width
        which, order = self.which[self._lines(tile), :keys].sort(stable=True)
        each = torch.arange(len(self.ids)).expand(len(which), -1).contiguous()
        starts = torch.searchsorted(which, each)
        firsts = torch.arange(0, n * which.numel() * self.count, keys)
        firsts = firsts.view(n, len(which), self.count, 1)
        return (firsts + order.unsqueeze(1)).flatten(), (firsts + starts.unsqueeze(1)).flatten()

    def _add_runs(self, x: Tensor, blocks: Tensor, at: Tensor, tile: Tile) -> None:
        """Add a tile of complete blocks; a run is a row of a block."""
        runs, starts, blocks_of = self._cached("order", tile, lambda: self._order(at, len(x)))
        sums = F.embedding_bag(runs, x.view(-1, self.width), starts, mode="sum")
        sums = sums.view(len(x), self.count, len(blocks_of), self.width)
        blocks.index_add_(1, blocks_of, sums.transpose(1, 2))

    def _pieces(
        self, x: Tensor, blocks: Tensor, at: Tensor, tile: Tile, ahead: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield parts of x ``[n, rows, key rows, width, key width]``, blocks and their indices.

        Axes of the blocks and indices along which numbers repeat have size 1.
        """
        wide, keys = self.wide, tile.count - ahead
        first, last = tile.rows.start - self.prefix, tile.rows.stop - self.prefix
        line = first // wide
        # Complete rows, and incomplete ones around them.
        start = min(-(-first // wide) * wide, last)
        stop, whole = max(last // wide * wide, start), keys - keys % self.width
        rows = ((first, start), (start, stop), (stop, last))
        for (begin, end), (left, right) in itertools.product(rows, ((0, whole), (whole, keys))):
            if begin < end and left < right:
                high, long = min(wide, end - begin), min(self.width, right - left)
                some = x[:, begin - first : end - first, ahead + left : ahead + right]
                some = some.unflatten(2, (-1, long)).unflatten(1, (-1, high)).transpose(2, 3)
                own = _some(_some(blocks, 2, begin % wide - self.start, high), 3, 0, long)
                places = _some(at, 0, begin // wide - line, some.shape[1])
                yield some, own, _some(places, 1, left // self.width, some.shape[2])


def _some(x: Tensor, axis: int, start: int, length: int) -> Tensor:
    """Narrow an axis, unless its size is 1."""
    return x if x.shape[axis] == 1 else x.narrow(axis, start, length)
