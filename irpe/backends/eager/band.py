"""Tokens in a line, one step after another: a bucket depends on the distance from i to j alone.

A query's numbers by offset are one row of memory: the far ends, where all offsets share a bucket,
and between them a band. The rows of a tile are this row, each one place further on: a view.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from ...buckets import BucketIds
from ...geometry import Geometry
from .prefixed import Prefixed, around, ends
from .spread import Pattern, Spread
from .tile import Keys, Tile


class Line(Pattern):
    """Queries and keys at consecutive positions, behind prefix tokens.

    Args:
        step: from a token to the next. start: the first query's position minus the first key's.
    """

    def __init__(self, geometry: Geometry, step: Tensor, start: Tensor) -> None:
        self.prefix, self.key_prefix = geometry.prefix, geometry.key_prefix
        self.queries = geometry.query_length - self.prefix
        self.key_count = geometry.key_length - self.key_prefix
        self.step, self.start = step, start

    def keys(self, seen: Tensor) -> Keys:
        """The shortest stretch that holds all that are seen."""
        first, last = ends(seen[self.key_prefix :])
        inside = torch.zeros_like(seen[self.key_prefix :])
        inside[first:last] = True
        return around(seen, self.key_prefix, inside, (first, last))

    def spread(
        self, buckets: BucketIds, owner: str, device: torch.device
    ) -> tuple[Hashable, Callable[[], Spread], Tensor | None]:
        if owner == "key":
            return super().spread(buckets, owner, device)
        key = ("band", buckets.function, buckets.by_key, device)

        def make() -> Band:
            return buckets.geometry.remember(key, lambda: Band(self, buckets, device))

        return key, make, None


def line(geometry: Geometry) -> Line | None:
    """The line that a geometry's tokens make, None if they make none."""
    if geometry.batch is not None:
        return None
    query, key = (p.flatten(0, -2) for p in geometry.positions(torch.device("cpu")))
    if query.is_floating_point() or key.is_floating_point() or min(len(query), len(key)) < 2:
        return None
    steps = [torch.unique(p.diff(dim=0), dim=0) for p in (query, key)]
    if any(len(s) > 1 for s in steps) or not torch.equal(*steps):
        return None
    return Line(geometry, steps[0][0], query[0] - key[0])


class Band(Prefixed):
    """Buckets by offset, from the largest (last query, first key) to the smallest."""

    def __init__(self, line: Line, buckets: BucketIds, device: torch.device) -> None:
        super().__init__(buckets.size, line.prefix, line.key_prefix)
        self.queries = line.queries
        count = torch.arange(line.queries - 1, -line.key_count, -1, device=device)
        offsets = line.start.to(device) + count.unsqueeze(1) * line.step.to(device)
        self.ids = buckets.function(-offsets if buckets.by_key else offsets)
        ends = [int(self.ids[0]), int(self.ids[-1])]
        inner = [(self.ids != end).nonzero() for end in ends]
        self.first, self.last = ends
        # Where the band starts and ends; all offsets alike: no band.
        self.start = int(inner[0][0]) if len(inner[0]) else len(self.ids)
        self.stop = int(inner[1][-1]) + 1 if len(inner[1]) else 0

    def _queries(self) -> int:
        return self.prefix + self.queries

    def _lay(self, numbers: Tensor, keys: Keys) -> Tensor:
        return numbers

    def _blank(self, like: Tensor, n: int, keys: Keys) -> Tensor:
        return like.new_zeros(n, self._queries(), self.size)

    def _write(self, out: Tensor, laid: Tensor, tile: Tile) -> None:
        n, queries, keys = out.shape
        first, start, stop, long = self._window(queries, keys, tile)
        rows = laid[:, tile.rows]
        line = rows.new_empty(n, queries, long)
        line[..., :start] = rows[..., self.first, None]
        line[..., stop:] = rows[..., self.last, None]
        if start < stop:
            ids = self.ids[first + start : first + stop].expand(n, queries, -1)
            torch.gather(rows, -1, ids, out=line[..., start:stop])
        out.copy_(_slanted(line, keys))

    def _add(self, sums: Tensor, x: Tensor, tile: Tile) -> None:
        n, queries, keys = x.shape
        first, start, stop, long = self._window(queries, keys, tile)
        line = x.new_zeros(n, queries, long)
        _slanted(line, keys).copy_(x)
        rows = sums[:, tile.rows]
        rows[..., self.first] += line[..., :start].sum(-1)
        rows[..., self.last] += line[..., stop:].sum(-1)
        if start < stop:
            ids = self.ids[first + start : first + stop].expand(n, queries, -1)
            rows.scatter_add_(-1, ids, line[..., start:stop])

    def _lift(self, sums: Tensor, keys: Keys, out: Tensor) -> None:
        out.copy_(sums)

    def _window(self, queries: int, keys: int, tile: Tile) -> tuple[int, int, int, int]:
        """Where the numbers of a tile start in ids, their band in them, and how many they are."""
        skipped = tile.keys.box[0] if tile.keys.box else 0
        first = self.queries - (tile.rows.start - self.prefix) - queries + skipped
        long = queries + keys - 1
        start = min(max(self.start - first, 0), long)
        return first, start, min(max(self.stop - first, start), long), long


def _slanted(line: Tensor, keys: int) -> Tensor:
    """The view ``[n, queries, keys]`` of rows ``[n, queries, queries + keys - 1]``.

    The last query's starts with its row's first number, each one before it a number later.
    """
    n, queries, long = line.shape
    return line.as_strided((n, queries, keys), (queries * long, long - 1, 1), queries - 1)
