"""Order the tokens of a whole grid so that a bucket id is a row part plus a column part.

strip_tiles.py reads this order.

A unit is 16 patches of one grid column, a run 16 patches of one grid row; prefix tokens make units
and runs of their own. Queries are ordered by units and keys by runs, with empty slots where a
grid's sides are no multiples of 16. In a grid of more than 16 rows the units of rows 0 to 15 come
first, then those of rows 16 to 31: all units of a tile have the same rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...buckets import BucketIds, ImageBuckets
from ...geometry import Grid
from ...terms import Term

UNIT = 16  # a side of the smallest matrix product of a tensor core
TILE = 64  # the largest block of slots of a kernel
METHODS = ("product", "rows", "columns")  # their buckets have a row part and a column part
# Factor of work through empty slots up to which strips are predicted (not measured) to be faster
# than maps of ids, whose row pass has one atomic addition per pair.
WASTE = 2.5


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
    if 2 * index.bound + 1 > UNIT:
        return False
    owned = UNIT * (_owned_units(grid) + _units(grid.prefix))
    tokens = _up(grid.query_length, TILE)
    return _up(owned, TILE) * sum(_part_runs(grid)) * UNIT <= WASTE * tokens * tokens


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


def places(buckets: BucketIds, by_column: bool, device: torch.device) -> Tensor:
    """Return the id in a table of each number of a row, int64 ``[W]``; -1: never read.

    Args:
        buckets: of a term.
        by_column: the order of a key's row, whose runs are row parts: column part * side + row
            part. Rows of queries have row part * side + column part.
        device: of the result.
    """
    sides = 2 * _function(buckets).index.bound + 1
    at = torch.arange(width(buckets), device=device)
    row, column = at // side(buckets), at % side(buckets)
    if by_column:
        row, column = column, row
    method = _function(buckets).method
    ids = row * sides + column if method == "product" else row if method == "rows" else column
    last = buckets.size - 1 if buckets.size != buckets.function.size else -1
    ids = torch.where((row < sides) & (column < sides), ids, last)
    return torch.where((row > sides) | (column > sides), -1, ids)


def share(width: int, side: int) -> Tensor:
    """Return the row in a share of each of the W numbers of a query, int64 ``[W]``.

    -1: none of its own. Pairs with a prefix token, whose row part is the last one and whose column
    part is any, have one row together: the last one.
    """
    sides = width // side - 1
    at = torch.arange(width)
    row, column = at // side, at % side
    own = torch.where((row < sides) & (column < sides), row * sides + column, -1)
    own[sides * side + sides] = sides * sides
    return own


def strips(buckets: BucketIds, device: torch.device) -> dict[str, Any]:
    """Return the slots of a grid's tokens as fields of ``Plan``."""
    grid, index = buckets.geometry, _function(buckets).index
    assert isinstance(grid, Grid)
    height, columns, prefix, length = grid.height, grid.width, grid.prefix, grid.query_length
    outside = 2 * index.bound + 1  # row or column part of pairs with a prefix token

    def arange(n: int) -> Tensor:
        return torch.arange(n, device=device)

    # Queries: unit after unit down the columns, block after block of 16 rows.
    lane, wide = arange(UNIT), _owned_units(grid) // _units(height)
    unit = arange(wide * _units(height)).unsqueeze(1)
    column, row = unit % wide, unit // wide * UNIT + lane
    inside = (row < height) & (column < columns)
    own = torch.where(inside, prefix + row * columns + column, length)
    first = arange(_units(prefix) * UNIT)
    before = torch.where(first < prefix, first, length)
    order = torch.cat((own.flatten(), before))
    # An empty slot has the row part of its lane, as the other units of its tile do.
    row_of_slot = torch.cat((row.expand(-1, UNIT).flatten(), before * 0 - 1))
    column_of_unit = torch.cat((column.flatten(), before[::UNIT] * 0 - 1))

    # Keys: part after part of 16 columns, run after run down the rows.
    parts = [arange(n) for n in _part_runs(grid)]
    row_of_run = torch.cat([torch.where(p < height, p, -1) for p in parts])

    def part_of(own: Tensor, other: Tensor) -> Tensor:
        """Return the row or column part, ``[own, other]``; -1: prefix tokens."""
        own = own.unsqueeze(1)
        found = index(own - other) + index.bound
        return torch.where((own < 0) | (other < 0), outside, found).to(torch.uint8)

    column_of_run = torch.cat([p * 0 + n * UNIT for n, p in enumerate(parts)])
    place = column_of_run.unsqueeze(1) + lane
    patch = prefix + row_of_run.unsqueeze(1) * columns + place
    spare = (torch.cat(parts) - height).unsqueeze(1) * UNIT + lane  # where prefix tokens may be
    before = torch.where((column_of_run == place[-1, 0]).unsqueeze(1), spare, length)
    others = torch.where(place < columns, patch, length)
    others = torch.where(
        row_of_run.unsqueeze(1) >= 0, others, torch.where(before < prefix, before, length)
    )
    slots = order.shape[0]
    row_of_slot = _padded(row_of_slot, TILE, 0)
    column_of_unit = _padded(column_of_unit, TILE // UNIT, 0)
    return {
        "order": _padded(order, TILE, length).to(torch.int32),
        "others": others.flatten().to(torch.int32),
        "runs": part_of(row_of_slot, row_of_run[-len(parts[-1]) :]),  # those of other parts too
        "units": part_of(column_of_unit, arange(_units(columns) * UNIT)),
        "slots": slots,
        "width": width(buckets),
        "side": side(buckets),
        "parts": len(parts),
        "part_slots": _up(height, TILE // UNIT) * UNIT,
    }


def _owned_units(grid: Grid) -> int:
    """Return the units of patches; those of a block of rows fill whole tiles."""
    blocks = _units(grid.height)
    return grid.width if blocks == 1 else blocks * _up(grid.width, TILE // UNIT)


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
