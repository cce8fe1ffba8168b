"""Order the tokens of a whole grid so that a bucket id is a row part plus a column part.

strip_tiles.py reads this order.

A unit is 16 patches of one grid column, a run 16 patches of one grid row; prefix tokens make units
and runs of their own. Owned tokens are ordered by units and streamed ones by runs, with empty slots
where a grid's sides are no multiples of 16.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...buckets import BucketIds, ImageBuckets
from ...geometry import Grid
from ...terms import Term

UNIT = 16  # a side of the smallest matrix product of a tensor core
TILE = 64  # the largest block of owned or streamed slots of a kernel
METHODS = ("product", "rows", "columns")  # their buckets have a row part and a column part
# Factor of work through empty slots up to which strips are predicted (not measured) to be faster.
WASTE = 1.75


def applicable(terms: Sequence[Term], dtype: torch.dtype, is_causal: bool) -> bool:
    """Return whether strips fit a call: one whole grid and one index for all of its terms."""
    if not terms or is_causal or dtype == torch.float32:
        return False
    grid, first = terms[0].buckets.geometry, terms[0].buckets.function
    if not isinstance(grid, Grid) or not grid.whole or not isinstance(first, ImageBuckets):
        return False
    index = first.index
    for term in terms:
        function = term.buckets.function
        if term.buckets.geometry != grid:
            return False
        if not isinstance(function, ImageBuckets) or function.index != index:
            return False
        if function.method not in METHODS:
            return False
    narrow, kinds = side(terms[0].buckets) == 8, {term.kind for term in terms}
    if 2 * index.bound + 1 > 16 or not (narrow or kinds <= {"bias", "query"}):
        return False  # wide runs leave no registers for other kinds
    owned = _up(grid.width * _units(grid.height) + _units(grid.prefix), TILE // UNIT) * UNIT
    streamed = sum(_part_runs(grid)) * UNIT
    tokens = _up(grid.query_length, TILE)
    return owned * streamed <= WASTE * tokens * tokens


def side(buckets: BucketIds) -> int:
    """Return the numbers of a run: column buckets, rounded up."""
    return 8 if 2 * _function(buckets).index.bound + 1 <= 8 else 16


def _function(buckets: BucketIds) -> ImageBuckets:
    assert isinstance(buckets.function, ImageBuckets)
    return buckets.function


def width(buckets: BucketIds) -> int:
    """Return W: row buckets and one for the prefix, times side; a multiple of 16."""
    rows = 2 * _function(buckets).index.bound + 2
    return rows * side(buckets)


def places(buckets: BucketIds, device: torch.device) -> Tensor:
    """Return the id in a table of each number of a row, int64 ``[W]``."""
    sides = 2 * _function(buckets).index.bound + 1
    at = torch.arange(width(buckets), device=device)
    row, column = at // side(buckets), (at % side(buckets)).clamp(max=sides - 1)
    inner = row.clamp(max=sides - 1)
    method = _function(buckets).method
    ids = inner * sides + column if method == "product" else inner if method == "rows" else column
    if buckets.size == buckets.function.size:
        return ids
    return torch.where(row < sides, ids, buckets.size - 1)


def strips(buckets: BucketIds, device: torch.device) -> dict[str, Any]:
    """Return the slots of a grid's tokens as fields of ``Plan``."""
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
    # The whole id, for reading the rows of streamed tokens.
    wide = runs.repeat_interleave(UNIT, 2) * side(buckets)
    ids = wide + units.index_select(2, place.flatten()).repeat_interleave(UNIT, 1)
    ids = ids.to(torch.uint8).unsqueeze(1)
    return {
        "order": order.to(torch.int32),
        "others": others.flatten().to(torch.int32),
        "runs": tuple(runs.to(torch.uint8)),
        "units": tuple(units.to(torch.uint8)),
        "ids": ids[:1],
        "ids_turned": ids[1:],
        "width": width(buckets),
        "side": side(buckets),
        "parts": len(parts),
        "part_slots": _up(height, TILE // UNIT) * UNIT,
    }


def _units(n: int) -> int:
    return (n + UNIT - 1) // UNIT


def _up(n: int, multiple: int) -> int:
    return (n + multiple - 1) // multiple * multiple


def _part_runs(grid: Grid) -> list[int]:
    """Return the runs of each part, rounded up to whole tiles; prefix runs are in the last one."""
    step = TILE // UNIT
    plain = _up(grid.height, step)
    last = _up(grid.height + _units(grid.prefix), step)
    return [plain] * (_units(grid.width) - 1) + [last]


def _padded(x: Tensor, multiple: int, value: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[0] % multiple), value=value)
