"""Which queries and keys make a tile, and what a tile hides."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..call import Call
from .spread import Pattern
from .tile import Keys, Part, Tile

CAUSAL_ROWS = 64  # queries of a tile: what it computes in vain grows with them


class Tiles:
    """All tiles of a call, in the same order in every pass.

    Args:
        pattern: of the terms. size: numbers of a tile, roughly. threads: that share a tile.

    ``mask`` is what the tiles have to hide, ``dead`` are the rows that see nothing, both of four
    axes or None. Queries and images that see nothing for a simpler reason have no tile.
    """

    def __init__(self, call: Call, pattern: Pattern, size: int, threads: int) -> None:
        self.B, self.H, self.L = call.q.shape[:3]
        self.S = call.k.shape[-2]
        self.pattern, self.size, self.threads = pattern, size, threads
        self.mask: Tensor | None = None
        self.dead: Tensor | None = None
        self.causal = call.is_causal and call.mask is None
        padding = None if call.is_causal else _key_padding(call.mask, self.S)
        if padding is None and call.mask is not None:
            merged = call.merged_mask()
            self.mask, self.dead = (None if x is None else _four(x) for x in merged)
        self._parts = list(self._make(padding))

    def __iter__(self) -> Iterator[Part]:
        return iter(self._parts)

    def hide(self, logits: Tensor, tile: Tile) -> Tensor | None:
        """Masks a tile ``[n, rows, keys]`` in place; the rows that see nothing are returned.

        They are a bool tensor that broadcasts to the tile's shape, or None.
        """
        if tile.keys.hidden is not None:
            logits.masked_fill_(tile.keys.hidden, float("-inf"))
        if self.mask is not None:
            mask, wide = _of(self.mask, tile), logits.view(tile.shape)
            if mask.is_floating_point():
                wide += mask
            else:
                wide.masked_fill_(~mask, float("-inf"))
        elif self.causal:
            # The last query sees all keys of its tile, each one before it a key less.
            rows = tile.shape[2]
            late = torch.ones(rows, rows, dtype=torch.bool, device=logits.device).triu_(1)
            logits[..., -rows:].masked_fill_(late, float("-inf"))
        return None if self.dead is None else _of(self.dead, tile)

    def _make(self, padding: Tensor | None) -> Iterator[Part]:
        B = self.B
        if padding is None or padding.shape[0] == 1:
            seen = [(slice(0, B), None if padding is None else padding[0])] if B else []
        else:
            seen = [(slice(b, b + 1), padding[b]) for b in range(B)]
        for images, visible in seen:
            if visible is not None and not visible.any():
                continue
            every = visible is None or bool(visible.all())
            keys = Keys(self.S) if visible is None or every else self.pattern.keys(visible)
            S = keys.count
            # Few heads and many queries: what belongs to the keys stays in the cache as well.
            rows = min(self.L, CAUSAL_ROWS) if self.causal else self.L
            many = max(self.threads, self.size // max(1, rows * S))
            heads, step = min(self.H, many), max(1, many // self.H)
            for some in _split(images.start, images.stop, step):
                for few in _split(0, self.H, heads):
                    lead = slice(
                        some.start * self.H + few.start, (some.stop - 1) * self.H + few.stop
                    )
                    yield Part(lead, keys, list(self._tiles(some, few, lead, keys, S)))

    def _tiles(
        self, images: slice, heads: slice, lead: slice, keys: Keys, S: int
    ) -> Iterator[Tile]:
        nb, nh = images.stop - images.start, heads.stop - heads.start
        first = max(0, self.L - self.S) if self.causal else 0
        unit, prefix = self.pattern.unit, self.pattern.prefix
        most = max(1, self.size // max(1, nb * nh * unit * S)) * unit
        if self.causal:
            most = min(most, CAUSAL_ROWS)
        for rows in [*_split(first, prefix, most), *_split(max(first, prefix), self.L, most, unit)]:
            count = rows.stop + self.S - self.L if self.causal else S
            shape = (nb, nh, rows.stop - rows.start, count)
            yield Tile(images, heads, lead, rows, keys, count, shape)


def _split(start: int, stop: int, most: int, unit: int = 1) -> list[slice]:
    """Slices of about the same size, multiples of a unit, none larger than ``most``."""
    units = (stop - start + unit - 1) // unit
    if units <= 0:
        return []
    pieces = -(-units // (most // unit))
    ends = [start + units * n // pieces * unit for n in range(pieces)] + [stop]
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def _key_padding(mask: Tensor | None, keys: int) -> Tensor | None:
    """``[1 | B, S]`` if a mask says no more than which keys each image has."""
    if mask is None or mask.dtype != torch.bool:
        return None
    mask = _four(mask)
    if mask.shape[1] > 1 or mask.shape[2] > 1:
        return None
    return mask[:, 0, 0].expand(-1, keys)


def _of(mask: Tensor, tile: Tile) -> Tensor:
    """What a mask ``[1 | B, 1 | H, 1 | L, 1 | S]`` says about a tile."""
    where = (tile.images, tile.heads, tile.rows, slice(tile.count))
    sizes = zip(where, mask.shape, strict=True)
    return mask[tuple(own if size > 1 else slice(None) for own, size in sizes)]


def _four(mask: Tensor) -> Tensor:
    return mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
