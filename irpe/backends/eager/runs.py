"""Whole grids: a bucket parts into a row and a column bucket, so whole rows of keys are copied.

The numbers of a query are first dealt out along the columns, for each row bucket. Each grid row of
keys then is a run of neighbouring numbers, copied in one go, and since buckets grow with the offset
from row to row, the reverse is a sum over neighbouring rows.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...buckets import BucketIds, ImageBuckets
from ...buckets.piecewise import StepIndex
from ...geometry import Grid
from .prefixed import Prefixed, around, ends
from .spread import Pattern, Spread
from .tile import Keys, Tile

METHODS = ("product", "rows", "columns")


class WholeGrid(Pattern):
    """Patches of a whole grid, row by row, behind prefix tokens."""

    def __init__(self, grid: Grid) -> None:
        self.height, self.unit, self.prefix = grid.height, grid.width, grid.prefix

    def keys(self, seen: Tensor) -> Keys:
        """Those in the smallest rectangle of patches that holds all that are seen."""
        patches = seen[self.prefix :].view(self.height, self.unit)
        (top, bottom), (left, right) = (ends(patches.any(axis)) for axis in (1, 0))
        inside = torch.zeros_like(patches)
        inside[top:bottom, left:right] = True
        return around(seen, self.prefix, inside.flatten(), (top, bottom, left, right))

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

        kind = RunsByKey if owner == "key" else Runs

        def make() -> Runs:
            index = function.index
            return remember((kind, index, device), lambda: kind(self, index, device))

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
    """All offsets to the keys of a part, with one number for each query's grid row or column.

    Args:
        height, width: of the keys' rectangle. down: row buckets ``[H, height]``, ascending.
        across: column buckets ``[W, 1, width]``.
        at: for each query and row of keys, which of all queries' row buckets that is, ``[L *
            height]``. bags: for each query and row bucket, the first of all queries' rows of keys,
            ``[L * side]``. every: the numbers of these rows.
    """

    height: int
    width: int
    down: Tensor
    across: Tensor
    at: Tensor
    bags: Tensor
    every: Tensor


class Runs(Prefixed):
    """Buckets of offsets key - query, ordered by row bucket and then by column bucket.

    Rows of queries are laid out as ``[n * queries * side, width]``.
    """

    def __init__(
        self,
        pattern: WholeGrid,
        index: StepIndex,
        device: torch.device,
        by_key: bool = False,
    ) -> None:
        self.index = index
        self.side = 2 * index.bound + 1
        self.height, self.unit, prefix = pattern.height, pattern.unit, pattern.prefix
        super().__init__(self.side**2 + (prefix > 0), prefix, prefix, by_key)
        self.notes: dict[StepIndex, Window] = {}  # for all keys
        places = [torch.arange(n, device=device) for n in (self.height, self.unit)]
        # [query's, key's] row or column -> bucket
        self.rows, self.columns = (index(p - p.unsqueeze(1)) + index.bound for p in places)

    def window(self, keys: Keys) -> Window:
        """What the tiles of all parts with these keys share."""
        notes = keys.notes if keys.box else self.notes
        if self.index not in notes:
            notes[self.index] = self._made(keys)
        return notes[self.index]

    def _made(self, keys: Keys) -> Window:
        top, bottom, left, right = keys.box or (0, self.height, 0, self.unit)
        height, width, device = bottom - top, right - left, self.rows.device
        down = self.rows[:, top:bottom].contiguous()
        sides = torch.arange(self.side, device=device).expand(self.height, -1).contiguous()
        starts = torch.searchsorted(down, sides)
        queries = torch.arange(self.height * self.unit, device=device)
        queries = queries.view(self.height, self.unit, 1)
        return Window(
            height,
            width,
            down,
            self.columns[:, left:right].unsqueeze(1),
            (queries * self.side + down.unsqueeze(1)).flatten(),
            (queries * height + starts.unsqueeze(1)).flatten(),
            torch.arange(queries.numel() * height, device=device),
        )

    def _queries(self) -> int:
        return self.prefix + self.height * self.unit

    def _lay(self, numbers: Tensor, keys: Keys) -> Tensor:
        window, sides = self.window(keys), self._sides(numbers)
        dealt = sides.gather(-1, window.across.expand(*sides.shape[:-1], -1))
        return dealt.view(-1, window.width)

    def _blank(self, like: Tensor, n: int, keys: Keys) -> Tensor:
        width = self.window(keys).width
        return like.new_empty(n * self.height * self.unit * self.side, width)

    def _write(self, out: Tensor, laid: Tensor, tile: Tile) -> None:
        window, own = self.window(tile.keys), self._own(tile)
        if out.is_contiguous():
            at = window.at[own.start * window.height : own.stop * window.height]
            at = _repeated(at, len(out), len(laid) // len(out))
            torch.index_select(laid, 0, at, out=out.view(-1, window.width))
            return
        first, last = own.start // self.unit, own.stop // self.unit
        sides = laid.view(len(out), self.height, self.unit, self.side, window.width)
        here = out.view(len(out), -1, self.unit, window.height, window.width)
        for row, x in zip(range(first, last), here.unbind(1), strict=True):
            torch.index_select(sides[:, row], 2, window.down[row], out=x)

    def _add(self, sums: Tensor, x: Tensor, tile: Tile) -> None:
        window, own, n = self.window(tile.keys), self._own(tile), len(x)
        bags = window.bags[own.start * self.side : own.stop * self.side]
        bags = _repeated(bags - own.start * window.height, n, x.shape[1] * window.height)
        x = x.reshape(-1, window.width)
        every = window.every[: len(x)] if n == 1 else torch.arange(len(x), device=x.device)
        dealt = F.embedding_bag(every, x, bags, mode="sum")
        mine = slice(own.start * self.side, own.stop * self.side)
        sums.view(n, -1, window.width)[:, mine] = dealt.view(n, -1, window.width)

    def _lift(self, sums: Tensor, keys: Keys, out: Tensor) -> None:
        window, sides = self.window(keys), self._sides(out)
        dealt = sums.view(*sides.shape[:-1], window.width)
        sides.scatter_add_(-1, window.across.expand_as(dealt), dealt)

    def _sides(self, rows: Tensor) -> Tensor:
        """``[n, L, N]`` -> ``[n, H, W, side, side]``, a view."""
        inner = rows[:, self.prefix :, : self.side**2]
        return inner.view(len(rows), self.height, -1, self.side, self.side)

    def _own(self, tile: Tile) -> slice:
        """The queries of a tile, prefix tokens not counted."""
        return slice(tile.rows.start - self.prefix, tile.rows.stop - self.prefix)


class RunsByKey(Runs):
    """The same for rows of keys, laid out as ``[n, rows of keys * side, W, width]``."""

    def __init__(self, pattern: WholeGrid, index: StepIndex, device: torch.device) -> None:
        super().__init__(pattern, index, device, by_key=True)

    def _lay(self, numbers: Tensor, keys: Keys) -> Tensor:
        window, sides = self.window(keys), self._key_sides(numbers, keys)
        sides = sides.permute(0, 1, 3, 4, 2).contiguous()
        return sides.gather(3, self._across(window, sides)).flatten(1, 2)

    def _blank(self, like: Tensor, n: int, keys: Keys) -> Tensor:
        window = self.window(keys)
        return like.new_zeros(n, window.height * self.side, self.unit, window.width)

    def _write(self, out: Tensor, laid: Tensor, tile: Tile) -> None:
        for own, at in self._by_rows(out, tile):
            torch.index_select(laid, 1, at, out=own)

    def _add(self, sums: Tensor, x: Tensor, tile: Tile) -> None:
        for own, at in self._by_rows(x, tile):
            sums.index_add_(1, at, own)

    def _lift(self, sums: Tensor, keys: Keys, out: Tensor) -> None:
        window, sides = self.window(keys), self._key_sides(out, keys)
        inner = sums.new_zeros(sides.permute(0, 1, 3, 4, 2).shape)
        across = self._across(window, inner)
        inner.scatter_add_(3, across, sums.view(across.shape))
        sides.copy_(inner.permute(0, 1, 4, 2, 3))

    def _key_sides(self, rows: Tensor, keys: Keys) -> Tensor:
        """``[n, keys, N]`` -> ``[n, height, width, side, side]``, a view."""
        window, inner = self.window(keys), rows[:, self.prefix :, : self.side**2]
        return inner.view(len(rows), window.height, window.width, self.side, self.side)

    def _across(self, window: Window, sides: Tensor) -> Tensor:
        """Column buckets ``[n, height, side, W, width]``."""
        return window.across.squeeze(1).expand(*sides.shape[:3], -1, -1)

    def _by_rows(self, x: Tensor, tile: Tile) -> Iterator[tuple[Tensor, Tensor]]:
        """For each row of queries its ``[n, height, W, width]``, and the places of its buckets."""
        window, own = self.window(tile.keys), self._own(tile)
        views = x.view(len(x), -1, self.unit, window.height, window.width).transpose(2, 3)
        down = window.down[own.start // self.unit : own.stop // self.unit]
        first = torch.arange(window.height, device=x.device) * self.side
        return zip(views.unbind(1), (down + first).unbind(), strict=True)


def _repeated(places: Tensor, n: int, step: int) -> Tensor:
    """Places for each of n, a step further each time."""
    if n == 1:
        return places
    return (places + torch.arange(n, device=places.device).unsqueeze(1) * step).flatten()
