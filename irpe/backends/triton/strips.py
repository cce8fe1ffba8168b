"""Whole grids, ordered so that bucket ids part into rows and columns: what strip_tiles.py reads.

A unit is 16 patches of one grid column, a run 16 patches of one grid row; prefix tokens make units
and runs of their own. Owned tokens are ordered by units and streamed ones by runs, with empty slots
where a grid's sides are no multiples of 16.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...buckets import BucketIds, ImageBuckets
from ...geometry import Grid
from ...terms import Term

UNIT = 16
TILE = 64  # slots of a block of owned or streamed tokens
METHODS = ("product", "rows", "columns")
# More work than on the general path, by empty slots: predicted to pay up to here, not measured.
WASTE = 1.75


@dataclass(frozen=True, slots=True, eq=False)
class Strips:
    """Slots of a grid's tokens.

    Args:
        order: token of each owned slot, int32 ``[slots]``; L in empty ones. others: of each
            streamed one.
        runs: row part of the bucket of an owned slot and a run, uint8 ``[2, slots, runs]``: for
            offsets owned - streamed (queries own), and the other way round (keys own).
        units: column part for a unit and a column, uint8 ``[2, slots / 16, columns]``.
        ids: of the whole bucket, ``[2, 1, slots, streamed slots]``, likewise.
        side: numbers of a run. parts: of the streamed tokens, 16 columns each, all of part_slots
            slots; the last one has those of the prefix besides.
    """

    order: Tensor
    others: Tensor
    runs: Tensor
    units: Tensor
    ids: Tensor
    side: int
    parts: int
    part_slots: int


def applicable(terms: Sequence[Term], dtype: torch.dtype, is_causal: bool) -> bool:
    """Whether the products serve a call: one whole grid and one index for all of its terms."""
    if not terms or is_causal or dtype == torch.float32:
        return False
    grid, first = terms[0].buckets.geometry, terms[0].buckets.function
    if not isinstance(grid, Grid) or not grid.whole or not isinstance(first, ImageBuckets):
        return False
    index = first.index
    for term in terms:
        function = term.buckets.function
        if term.kind == "gain" or term.buckets.geometry is not grid:
            return False
        if not isinstance(function, ImageBuckets) or function.index != index:
            return False
        if function.method not in METHODS:
            return False
    narrow, kinds = side(terms[0].buckets) == 8, {term.kind for term in terms}
    if 2 * index.bound + 1 > 16 or not (narrow or kinds <= {"bias", "query"}):
        return False  # wide runs leave no registers for more
    owned = _up(grid.width * _units(grid.height) + _units(grid.prefix), TILE // UNIT) * UNIT
    streamed = sum(_part_runs(grid)) * UNIT
    tokens = _up(grid.query_length, TILE)
    return owned * streamed <= WASTE * tokens * tokens


def side(buckets: BucketIds) -> int:
    """Numbers of a run: column buckets, rounded up."""
    return 8 if 2 * _function(buckets).index.bound + 1 <= 8 else 16


def _function(buckets: BucketIds) -> ImageBuckets:
    assert isinstance(buckets.function, ImageBuckets)
    return buckets.function


def width(buckets: BucketIds) -> int:
    """Numbers of a row: row buckets, one for the prefix, times column buckets; a multiple of 16."""
    rows = 2 * _function(buckets).index.bound + 2
    return rows * side(buckets)


def places(buckets: BucketIds, device: torch.device) -> Tensor:
    """Id in a table for each of the numbers of a row, int64 ``[width]``, made once for a grid."""
    key = ("places", buckets.function, device)
    return buckets.geometry.remember(key, lambda: _places(buckets, device))


def _places(buckets: BucketIds, device: torch.device) -> Tensor:
    sides = 2 * _function(buckets).index.bound + 1
    at = torch.arange(width(buckets), device=device)
    row, column = at // side(buckets), (at % side(buckets)).clamp(max=sides - 1)
    inner = row.clamp(max=sides - 1)
    method = _function(buckets).method
    ids = inner * sides + column if method == "product" else inner if method == "rows" else column
    if buckets.size == buckets.function.size:
        return ids
    return torch.where(row < sides, ids, buckets.size - 1)


def strips(buckets: BucketIds, device: torch.device) -> Strips:
    """The slots of a grid, made once for it."""
    grid, index = buckets.geometry, _function(buckets).index
    return grid.remember(("strips", index, device), lambda: _strips(buckets, device))


def _strips(buckets: BucketIds, device: torch.device) -> Strips:
    grid, index = buckets.geometry, _function(buckets).index
    assert isinstance(grid, Grid)
    height, columns, prefix, length = grid.height, grid.width, grid.prefix, grid.query_length

    def arange(n: int) -> Tensor:
        return torch.arange(n, device=device)

    # Owned: unit after unit down the columns. A row of -1 stands for prefix tokens.
    unit, lane = arange(columns * _units(height)).unsqueeze(1), arange(UNIT)
    own_column = (unit // _units(height)).expand(-1, UNIT)
    own_row = unit % _units(height) * UNIT + lane
    own = torch.where(own_row < height, prefix + own_row * columns + own_column, length)
    first = arange(_units(prefix) * UNIT)
    before = torch.where(first < prefix, first, length)
    order = _padded(torch.cat((own.flatten(), before)), TILE, length)
    row_of_slot = torch.where(order < prefix, -1, (order - prefix) // columns)
    row_of_slot = torch.where(order < length, row_of_slot, 0)
    column_of_unit = _padded(torch.cat((own_column[:, 0], before[::UNIT] * 0)), TILE // UNIT, 0)

    # Streamed: part after part of 16 columns, run after run down the rows.
    parts = [arange(n) for n in _part_runs(grid)]
    row_of_run = torch.cat([torch.where(p < height, p, -1) for p in parts])

    def part_of(offset: Tensor) -> Tensor:
        return index(offset) + index.bound

    outside = (row_of_slot.unsqueeze(1) < 0) | (row_of_run < 0)
    down = row_of_slot.unsqueeze(1) - row_of_run
    across = column_of_unit.unsqueeze(1) - arange(_units(columns) * UNIT)
    runs = torch.stack(
        [torch.where(outside, 2 * index.bound + 1, part_of(o)) for o in (down, -down)]
    )
    units = torch.stack([part_of(o) for o in (across, -across)])
    column_of_run = torch.cat([p * 0 + n * UNIT for n, p in enumerate(parts)])
    place = column_of_run.unsqueeze(1) + lane
    patch = prefix + row_of_run.unsqueeze(1) * columns + place
    spare = (torch.cat(parts) - height).unsqueeze(1) * UNIT + lane  # where prefix tokens may be
    before = torch.where((column_of_run == place[-1, 0]).unsqueeze(1), spare, length)
    others = torch.where(place < columns, patch, length)
    others = torch.where(
        row_of_run.unsqueeze(1) >= 0, others, torch.where(before < prefix, before, length)
    )
    # The whole id, for tokens that meet rows of streamed ones.
    wide = runs.repeat_interleave(UNIT, 2) * side(buckets)
    ids = wide + units.index_select(2, place.flatten()).repeat_interleave(UNIT, 1)
    return Strips(
        order.to(torch.int32),
        others.flatten().to(torch.int32),
        runs.to(torch.uint8),
        units.to(torch.uint8),
        ids.to(torch.uint8).unsqueeze(1),
        side=side(buckets),
        parts=len(parts),
        part_slots=_up(height, TILE // UNIT) * UNIT,
    )


def _units(n: int) -> int:
    return (n + UNIT - 1) // UNIT


def _up(n: int, multiple: int) -> int:
    return (n + multiple - 1) // multiple * multiple


def _part_runs(grid: Grid) -> list[int]:
    """Runs of each part, rounded up to whole tiles; those of the prefix in the last one."""
    step = TILE // UNIT
    plain = _up(grid.height, step)
    last = _up(grid.height + _units(grid.prefix), step)
    return [plain] * (_units(grid.width) - 1) + [last]


def _padded(x: Tensor, multiple: int, value: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[0] % multiple), value=value)
