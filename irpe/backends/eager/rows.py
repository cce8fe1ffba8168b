"""Rows of tokens: those of a grid, and of a text cut into rows of equal length.

The ids between a row of queries and a row of keys are a block, and few blocks differ: bucket
functions are constant far away, and rows at the same offset have the same ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...buckets import BucketIds, prefix_ids
from ...geometry import Geometry

WIDTH = 32  # tokens of a row where one step leads from each token to the next
MOST = 1.0  # numbers gathered for blocks over those by the map, above which the map is faster
Both = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokens in rows of one length; the last row may be incomplete.

    Args:
        count: number of tokens.
        firsts: positions ``[height, A]`` of the first token of each row.
        columns: positions ``[width, A]`` of the tokens of a row, minus that of its first one.
        line: whether one step leads from each token to the next.
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
    """Return the rows that tokens at positions ``[n, A]`` make, None if they make none."""
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
    """Queries and keys in rows, behind numbers of prefix tokens."""

    query: Rows
    key: Rows
    prefix: int
    key_prefix: int

    def box(self, seen: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return the keys in a box around those seen, bool, and the box: ends of its axes."""
        seen = seen[self.key_prefix :].unsqueeze(0)
        rows = self.key.full(seen)[0]
        (top, bottom), (left, right) = (_ends(rows.any(axis)) for axis in (1, 0))
        inside = torch.zeros_like(rows)
        inside[top:bottom, left:right] = True
        ahead = seen.new_ones(self.key_prefix)
        return torch.cat((ahead, inside.flatten()[: self.key.count])), (top, bottom, left, right)

    def blocks(self, buckets: BucketIds, of_key: bool) -> Both | None:
        """Return ids ``[blocks, width | 1, key width | 1]``, and which blocks tokens have.

        The latter is the block of each row of queries and row of keys. None where as many numbers
        would be gathered for blocks as for all pairs.

        Args:
            buckets: of a term.
            of_key: whether its rows of numbers belong to keys.
        """
        if prefix_ids(buckets.function) is not None:
            return None
        key = ("blocks", buckets.function, buckets.by_key)
        ids, which = buckets.geometry.remember(key, lambda: self._blocks(buckets))
        others = self.query if of_key else self.key
        numbers = len(ids) * ids.shape[1 if of_key else 2]
        return (ids, which) if numbers < MOST * others.count else None

    def _blocks(self, buckets: BucketIds) -> Both:
        rows = self.query.firsts.unsqueeze(1) - self.key.firsts
        columns = self.query.columns.unsqueeze(1) - self.key.columns
        apart, which = torch.unique(rows.flatten(0, 1), dim=0, return_inverse=True)
        offsets = apart.view(-1, 1, 1, apart.shape[-1]) + columns
        ids = buckets.function(-offsets if buckets.by_key else offsets)
        ids, same = torch.unique(ids, dim=0, return_inverse=True)
        for axis in (1, 2):
            first = ids.narrow(axis, 0, 1)
            ids = first if bool((ids == first).all()) else ids
        return ids.contiguous(), same[which].view(rows.shape[:2])


def layout_of(geometries: Sequence[Geometry]) -> Layout | None:
    """Return the rows that all terms have in common, None if there are none."""
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


def _ends(seen: Tensor) -> tuple[int, int]:
    """The first and past the last True; 0 and 1 where there is none: no box is empty."""
    where = seen.nonzero()
    return (int(where[0]), int(where[-1]) + 1) if len(where) else (0, 1)
