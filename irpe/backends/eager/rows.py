"""Rows of tokens: the rows of a grid, or a text split into rows of equal length.

The ids of a row of queries and a row of keys form a block. Few blocks differ: rows at the same
offset have the same ids, and bucket functions are constant at large distances.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...buckets import BucketIds, prefix_ids
from ...geometry import Geometry

WIDTH = 32  # tokens of a row if all steps between tokens are equal
MOST = 1.0  # ratio of numbers gathered by blocks and by the map, above which the map is faster

Table = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokens in rows of equal length; the last row may be incomplete.

    Args:
        count: number of tokens.
        firsts: positions ``[height, A]`` of the first token of each row.
        columns: positions ``[width, A]`` of the tokens of a row, relative to its first token.
        line: whether all steps between tokens are equal.
    """

    count: int
    firsts: Tensor
    columns: Tensor
    line: bool

    @property
    def shape(self) -> tuple[int, int]:
        """``(height, width)``: number of rows and of tokens in a row."""
        return len(self.firsts), len(self.columns)

    def full(self, x: Tensor) -> Tensor:
        """Return ``[n, count, ...]`` with complete rows, ``[n, height, width, ...]``."""
        missing = len(self.firsts) * len(self.columns) - self.count
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing)) if missing else x
        return x.unflatten(1, self.shape)


def rows_of(positions: Tensor) -> Rows | None:
    """Return the rows of tokens at positions ``[n, A]``, or None if they are not in rows."""
    if positions.is_floating_point() or len(positions) < 2:
        return None
    steps = positions.diff(dim=0)
    turns = (steps != steps[0]).any(-1).nonzero()
    width = int(turns[0]) + 1 if len(turns) else min(WIDTH, len(positions))
    firsts, columns = positions[::width], positions[:width] - positions[0]
    wanted = (firsts.unsqueeze(1) + columns).flatten(0, 1)[: len(positions)]
    if not torch.equal(positions, wanted):
        return None
    return Rows(len(positions), firsts, columns, not len(turns))


@dataclass(frozen=True, slots=True)
class Layout:
    """Queries and keys in rows after prefix tokens."""

    query: Rows
    key: Rows
    prefix: int
    key_prefix: int

    def box(self, seen: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return the keys in the box around visible keys, bool, and (top, bottom, left, right)."""
        seen = seen[self.key_prefix :].unsqueeze(0)
        rows = self.key.full(seen)[0]
        (top, bottom), (left, right) = (_ends(rows.any(axis)) for axis in (1, 0))
        inside = torch.zeros_like(rows)
        inside[top:bottom, left:right] = True
        ahead = seen.new_ones(self.key_prefix)
        return torch.cat((ahead, inside.flatten()[: self.key.count])), (top, bottom, left, right)

    def blocks(self, buckets: BucketIds, of_key: bool) -> Table | None:
        """Return the different blocks of ids, and where they are.

        Args:
            buckets: buckets of a term.
            of_key: whether its rows of numbers belong to keys.

        Returns:
            Ids ``[blocks, offsets]`` of the different offsets within rows, or ``[blocks, 1]`` if
            they are equal; the offset ``[width, key width]`` of each pair of columns; the block
            ``[height, key height]`` of each pair of rows. None if blocks are not faster than the
            map of all pairs.
        """
        if prefix_ids(buckets.function) is not None:
            return None
        key = ("blocks", buckets.function, buckets.by_key)
        table: Table = buckets.geometry.remember(key, lambda: self._blocks(buckets))
        others, ids = self.query if of_key else self.key, table[0]
        numbers = len(ids) * (1 if ids.shape[1] == 1 else others.shape[1])
        return table if numbers < MOST * others.count else None

    def _blocks(self, buckets: BucketIds) -> Table:
        rows, which = _different(self.query.firsts, self.key.firsts)
        columns, offsets = _different(self.query.columns, self.key.columns)
        apart = rows.unsqueeze(1) + columns
        ids = buckets.function(-apart if buckets.by_key else apart)
        ids, same = torch.unique(ids, dim=0, return_inverse=True)
        if bool((ids == ids[:, :1]).all()):
            ids = ids[:, :1]
        return ids.contiguous(), offsets, same[which]


def layout_of(geometries: Sequence[Geometry]) -> Layout | None:
    """Return the layout that all terms share, or None."""
    if not geometries or any(other != geometries[0] for other in geometries):
        return None
    geometry: Geometry = geometries[0]
    layout: Layout | None = geometry.remember("layout", lambda: _layout(geometry))
    return layout


def _layout(geometry: Geometry) -> Layout | None:
    if geometry.batch is not None:
        return None
    query, key = (rows_of(p.flatten(0, -2)) for p in geometry.positions(torch.device("cpu")))
    if query is None or key is None:
        return None
    return Layout(query, key, geometry.prefix, geometry.key_prefix)


def _different(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the different offsets ``[n, A]``, and the index of that of each query and key."""
    offsets = queries.unsqueeze(1) - keys
    different, index = torch.unique(offsets.flatten(0, 1), dim=0, return_inverse=True)
    return different, index.view(offsets.shape[:2])


def _ends(seen: Tensor) -> tuple[int, int]:
    """Return the index of the first True and of the last plus 1; (0, 1) if there is none."""
    where = seen.nonzero()
    return (int(where[0]), int(where[-1]) + 1) if len(where) else (0, 1)
