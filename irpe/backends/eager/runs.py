"""Whole grids: a bucket parts into a row and a column bucket, so whole rows of keys are copied.

The numbers of a query are first dealt out along the columns, for each row bucket. Each grid row of
keys then is a run of neighbouring numbers, copied in one go, and since buckets grow with the offset
from row to row, the reverse is a sum over neighbouring rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ...buckets import BucketIds, ImageBuckets
from ...buckets.piecewise import StepIndex
from ...geometry import Grid
from .prefixed import Prefixed, ends
from .spread import Keys, Pattern, Spread

if TYPE_CHECKING:
    from .tiles import Tile

METHODS = ("product", "rows", "columns")


class WholeGrid(Pattern):
    """Patches of a whole grid, row by row, behind prefix tokens."""

    def __init__(self, grid: Grid) -> None:
        self.height, self.unit, self.prefix = grid.height, grid.width, grid.prefix

    def keys(self, seen: Tensor | None) -> Keys:
        """Those in the smallest rectangle of patches that holds all that are seen."""
        if seen is None or bool(seen.all()):
            return Keys()
        patches = seen[self.prefix :].view(self.height, self.unit)
        (top, bottom), (left, right) = (ends(patches.any(axis)) for axis in (1, 0))
        inside = torch.zeros_like(patches)
        inside[top:bottom, left:right] = True
        index = torch.cat((torch.ones_like(seen[: self.prefix]), inside.flatten())).nonzero()
        index = index.squeeze(1)
        hidden = ~seen[index]
        return Keys(index, hidden if bool(hidden.any()) else None, (top, bottom, left, right))

    def spread(
        self, buckets: BucketIds, owner: str, device: torch.device
    ) -> tuple[Hashable, Callable[[], Spread], Tensor | None]:
        function = buckets.function
        if not isinstance(function, ImageBuckets) or function.method not in METHODS:
            return super().spread(buckets, owner, device)
        remember = buckets.geometry.remember
        places = remember(
            ("places", function, buckets.by_key, device), lambda: _places(function, buckets, device)
        )

        def make() -> Runs:
            return remember(
                ("runs", function.index, device), lambda: Runs(self, function.index, device)
            )

        return function.index, make, places


def _places(function: ImageBuckets, buckets: BucketIds, device: torch.device) -> Tensor:
    """Ids in a term's table of a product's buckets for offsets key - query."""
    side = 2 * function.index.bound + 1
    ids = torch.arange(side * side, device=device)
    row, column = ids // side, ids % side
    if not buckets.by_key:
        row, column = side - 1 - row, side - 1 - column
    ids = {"product": row * side + column, "rows": row, "columns": column}[function.method]
    last = ids.new_full((buckets.size - function.size,), function.size)
    return torch.cat((ids, last))


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """The buckets of all offsets to the keys of a part.

    Args:
        height, width: of the keys' rectangle. down: row buckets ``[H, height]``, ascending.
            starts: where each of them starts, ``[H, side]``. across:
            column buckets, ``[W, width]``.
    """

    height: int
    width: int
    down: Tensor
    starts: Tensor
    across: Tensor


class Runs(Prefixed):
    """Buckets of offsets key - query, ordered by row bucket and then by column bucket."""

    def __init__(self, pattern: WholeGrid, index: StepIndex, device: torch.device) -> None:
        prefix = pattern.prefix
        self.side = 2 * index.bound + 1
        super().__init__(self.side**2 + (prefix > 0), prefix, prefix)
        self.unit = pattern.unit
        places = [torch.arange(n, device=device) for n in (pattern.height, pattern.unit)]
        # [query's, key's] row or column -> bucket
        self.rows, self.columns = (index(p - p.unsqueeze(1)) + index.bound for p in places)

    def _window(self, keys: Keys) -> Window:
        if self not in keys.notes:
            top, bottom, left, right = keys.box or (0, len(self.rows), 0, self.unit)
            down = self.rows[:, top:bottom].contiguous()
            sides = torch.arange(self.side, device=down.device).expand(len(down), -1).contiguous()
            starts = torch.searchsorted(down, sides)
            across = self.columns[:, left:right]
            keys.notes[self] = Window(bottom - top, right - left, down, starts, across)
        return keys.notes[self]

    def _write(self, out: Tensor, rows: Tensor, tile: Tile) -> None:
        window = self._window(tile.keys)
        sides = self._sides(rows)
        dealt = sides.gather(-1, window.across.unsqueeze(1).expand(*sides.shape[:-1], -1))
        down = window.down[self._grid_rows(tile)]
        if out.is_contiguous():
            every = torch.arange(0, dealt.numel() // window.width, self.side, device=out.device)
            at = (every.view(*sides.shape[:3], 1) + down.unsqueeze(1)).flatten()
            flat = dealt.view(-1, window.width)
            torch.index_select(flat, 0, at, out=out.view(-1, window.width))
        else:
            own = self._by_rows(out, window).unbind(1)
            for here, there, at in zip(own, dealt.unbind(1), down, strict=True):
                torch.index_select(there, 2, at, out=here)

    def _sum(self, sums: Tensor, x: Tensor, tile: Tile) -> None:
        window, sides = self._window(tile.keys), self._sides(sums)
        every = torch.arange(x.numel() // window.width, device=x.device)
        first = every[:: window.height].view(*sides.shape[:3], 1)
        bags = first + window.starts[self._grid_rows(tile)].unsqueeze(1)
        x = x.reshape(-1, window.width)
        dealt = F.embedding_bag(every, x, bags.flatten(), mode="sum").view(*sides.shape[:-1], -1)
        sides.scatter_add_(-1, window.across.unsqueeze(1).expand_as(dealt), dealt)

    def lay(self, numbers: Tensor, keys: Keys) -> tuple[Tensor, ...]:
        window = self._window(keys)
        inner = numbers[:, self.prefix :, : self.side**2]
        inner = inner.view(-1, window.height, window.width, self.side, self.side)
        inner = inner.permute(0, 1, 3, 4, 2).contiguous()
        across = window.across.expand(*inner.shape[:3], -1, -1)
        # [n, rows of keys * side, W, width]; and of each key the bucket of prefix tokens
        return inner.gather(3, across).flatten(1, 2), numbers[..., -1].contiguous()

    def write_laid(self, out: Tensor, laid: tuple[Tensor, ...], tile: Tile) -> None:
        dealt, last = laid
        ahead = self._ahead(tile)
        if ahead:
            out[..., :ahead] = last[:, None, :ahead]
        if ahead < tile.count:
            for own, at in self._laid_rows(out[..., ahead:], tile):
                torch.index_select(dealt, 1, at, out=own)

    def add_laid(self, sums: tuple[Tensor, ...], x: Tensor, tile: Tile) -> None:
        dealt, last = sums
        ahead = self._ahead(tile)
        if ahead:
            last[:, :ahead] += x[..., :ahead].sum(1)
        if ahead < tile.count:
            for own, at in self._laid_rows(x[..., ahead:], tile):
                dealt.index_add_(1, at, own)

    def lift(self, sums: tuple[Tensor, ...], keys: Keys) -> Tensor:
        dealt, last = sums
        window, n = self._window(keys), len(dealt)
        inner = dealt.new_zeros(n, window.height, self.side, self.side, window.width)
        across = window.across.expand(*inner.shape[:3], -1, -1)
        inner.scatter_add_(3, across, dealt.view(across.shape))
        numbers = dealt.new_zeros(*last.shape, self.size)
        if self.prefix:
            numbers[..., -1] = last
        inner = inner.permute(0, 1, 4, 2, 3).reshape(n, -1, self.side**2)
        numbers[:, self.prefix :, : self.side**2] = inner
        return numbers

    def _laid_rows(self, x: Tensor, tile: Tile) -> Iterator[tuple[Tensor, Tensor]]:
        """For each row of queries its ``[n, rows of keys, W, width]``, and their places."""
        window = self._window(tile.keys)
        own = self._by_rows(x, window).transpose(2, 3).unbind(1)
        first = torch.arange(window.height, device=x.device) * self.side
        return zip(own, (first + window.down[self._grid_rows(tile)]), strict=True)

    def _sides(self, rows: Tensor) -> Tensor:
        """``[n, rows, N]`` -> ``[n, grid rows, W, side, side]``, a view."""
        inner = rows[..., : self.side**2]
        return inner.view(len(rows), -1, self.unit, self.side, self.side)

    def _by_rows(self, x: Tensor, window: Window) -> Tensor:
        """``[n, rows, keys]`` -> ``[n, grid rows, W, height, width]``, a view."""
        return x.view(len(x), -1, self.unit, window.height, window.width)

    def _grid_rows(self, tile: Tile) -> slice:
        start, stop = ((n - self.prefix) // self.unit for n in (tile.rows.start, tile.rows.stop))
        return slice(start, stop)
