"""Tiles: queries and keys that are computed together and fit in the processor's cache."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, inf

from ..call import Call
from .rows import Layout

CAUSAL_ROWS = 128  # queries of a tile: with 32, T5 and Shaw take 1.1 times as long


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """Queries and keys of all heads of some images, or of some heads of one image.

    Args:
        images: slice of B.
        heads: slice of H.
        rows: slice of L.
        count: number of keys.
        columns: (left, right) of the queries after the prefix; the end is exclusive.
        index: indices of the keys, ascending; None: the first ``count`` keys.
        hidden: bool, the masked keys among them; None: none.
        box: (top, bottom, left, right) of the keys after the prefix; the ends are exclusive. Empty:
            all.
    """

    images: slice
    heads: slice
    rows: slice
    count: int
    columns: tuple[int, int]
    index: Tensor | None = None
    hidden: Tensor | None = None
    box: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(images, heads, rows, count)``."""
        nb, nh, rows = (s.stop - s.start for s in (self.images, self.heads, self.rows))
        return nb, nh, rows, self.count

    @property
    def flat(self) -> tuple[int, int, int]:
        """``(images * heads, rows, count)``."""
        nb, nh, rows, count = self.shape
        return nb * nh, rows, count


class Tiles:
    """The tiles of a call, in the same order in every pass.

    Args:
        call: the call.
        layout: layout of the tokens; None: unknown.
        size: approximate number of logits of a tile.
        columns: maximum number of columns of queries of a part.
        threads: number of threads that share a tile.
        kept: whether probabilities are kept.

    Attributes:
        parts: tiles of the same images, heads, keys and columns of queries.
        one: whether one tile is the whole call.
    """

    def __init__(
        self, call: Call, layout: Layout | None, size: int, columns: int, threads: int, kept: bool
    ) -> None:
        (self.B, self.H, self.L), self.S = call.q.shape[:3], call.k.shape[-2]
        self.layout, self.size, self.causal, self.step = layout, size, call.is_causal, self.L
        if call.is_causal:
            self.step = max(CAUSAL_ROWS, -(-self.L // 8)) if kept else CAUSAL_ROWS
        self.call, padding = call, None
        if call.mask is not None:
            sizes = (1,) * (4 - call.mask.dim()) + call.mask.shape
            if call.mask.dtype == torch.bool and not (kept or self.causal or sizes[1:3] != (1, 1)):
                # Visible keys of each image.
                padding = call.mask.expand(self.B, self.H, self.L, self.S)[:, 0, 0]
        self.padded = padding is not None
        # Prefix tokens have separate tiles; others have tiles of rows, or of a part of a row.
        self.width = 1 if layout is None else layout.query.shape[1]
        self.columns = min(self.width, columns)
        self.prefix = 0 if layout is None else layout.prefix
        parts = map(self._tiles, self._parts(padding, threads))
        self.parts = [tiles for tiles in parts if tiles]  # causal queries may see no key
        shapes = [tile.shape for part in self.parts for tile in part]
        self.one = shapes == [(self.B, self.H, self.L, self.S)]

    def hide(self, logits: Tensor, tile: Tile) -> Tensor | None:
        """Mask logits ``[n, rows, keys]`` in place; return the fully masked rows, or None."""
        if tile.hidden is not None:
            logits.masked_fill_(tile.hidden, -inf)
        mask, dead = self._mask
        if mask is not None:
            own = mask[tile.images, tile.heads, tile.rows, : tile.count]
            wide = logits.view(tile.shape)
            wide.add_(own) if own.is_floating_point() else wide.masked_fill_(own, -inf)
        elif self.causal and tile.shape[2] > 1:
            # The last query attends to all keys of its tile, the one before it to one key less.
            rows = tile.shape[2]
            late = torch.ones(rows, rows, dtype=torch.bool, device=logits.device).triu_(1)
            logits[..., -rows:].masked_fill_(late, -inf)
        return None if dead is None else dead[tile.images, tile.heads, tile.rows]

    @cached_property
    def _mask(self) -> tuple[Tensor | None, Tensor | None]:
        """Return hidden pairs, bool, or numbers to add to logits; and the fully masked rows."""
        if self.padded or self.call.mask is None:
            return None, None
        mask, dead = self.call.merged_mask()
        assert mask is not None and dead is not None
        mask = mask if mask.is_floating_point() else ~mask
        shape = (self.B, self.H, self.L)
        none = dead.device.type == "cpu" and not dead.any()
        return mask.expand(*shape, self.S), None if none else dead.expand(*shape, 1)

    def _parts(self, padding: Tensor | None, least: int) -> Iterator[Tile]:
        """Yield a tile with all queries and keys of each part, of at least ``least`` heads."""
        seen = [self._whole(slice(0, self.B))]
        if padding is not None:
            each = enumerate(padding)
            seen = [self._visible(slice(b, b + 1), keys) for b, keys in each if keys.any()]
        for whole in seen if self.B else ():
            # All queries of few heads, so that tensors of the keys stay in the cache too.
            many = max(least, self.size // max(1, min(self.step, self.L) * whole.count))
            first, last = whole.images.start, whole.images.stop
            for images in _split(first, last, max(1, many // self.H)):
                for some in _split(0, self.H, min(self.H, many)):
                    part = replace(whole, images=images, heads=some)
                    # Numbers gathered for a tile would grow with the width of its rows.
                    for columns in _split(0, self.width, min(self.columns, self._room(part))):
                        yield replace(part, columns=(columns.start, columns.stop))

    def _whole(self, images: slice) -> Tile:
        return Tile(images, slice(0, self.H), slice(0, self.L), self.S, (0, self.width))

    def _room(self, whole: Tile) -> int:
        """Return the number of queries of a tile."""
        return max(1, self.size // max(1, whole.shape[0] * whole.shape[1] * whole.count))

    def _tiles(self, whole: Tile) -> list[Tile]:
        """Return the tiles of a part: of the prefix, then of rows, or of its columns of a row."""
        first, (left, right) = max(0, self.L - self.S) if self.causal else 0, whole.columns
        behind, room = max(first, self.prefix), self._room(whole)
        if right - left < self.width:
            starts = range(self.prefix, self.L, self.width)
            ends = [(max(first, n + left), min(n + right, self.L)) for n in starts]
            tiles = [slice(start, end) for start, end in ends if start < end]
        else:
            most = max(self.width, min(room // self.width * self.width, self.step))
            tiles = _split(behind, self.L, most, self.width)
        tiles = _split(first, self.prefix, room) * (left == 0) + tiles
        counts = [rows.stop + self.S - self.L if self.causal else whole.count for rows in tiles]
        return [replace(whole, rows=r, count=n) for r, n in zip(tiles, counts, strict=True)]

    def _visible(self, images: slice, seen: Tensor) -> Tile:
        """Return a tile of the visible keys, or of the box around them."""
        whole = self._whole(images)
        if seen.all():
            return whole
        inside, box = (seen, ()) if self.layout is None else self.layout.box(seen)
        index = inside.nonzero().squeeze(1)
        hidden = ~seen[index]
        some = hidden if bool(hidden.any()) else None
        return replace(whole, count=len(index), index=index, hidden=some, box=box)


def _split(start: int, stop: int, most: int, unit: int = 1) -> list[slice]:
    """Return slices of similar sizes, multiples of ``unit`` and at most ``most``."""
    units = (stop - start + unit - 1) // unit
    if units <= 0:
        return []
    pieces = -(-units // (most // unit))
    ends = [start + units * n // pieces * unit for n in range(pieces)] + [stop]
    return [slice(a, b) for a, b in itertools.pairwise(ends)]
