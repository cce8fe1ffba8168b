"""Caches of a language model for earlier tokens.

Caches are immutable: more tokens make a new cache.

Shapes: B texts, H heads, S cached tokens, C channels, D channels of a head.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Kept(NamedTuple):
    """The cache of one layer; it is detached from the graph.

    If gradients are computed, it has the layer's inputs, which the next step projects with its
    weights. Otherwise it has the projections.

    Attributes:
        inputs: inputs of the projections, ``[B, S, C]``; the others are then None.
        k: keys ``[B, H, S, D]`` with the encoding applied; with ``pia`` without positions; with a
            rotation that depends on the length of the text, before the rotation.
        v: values ``[B, H, S, D]``.
        waves: with ``pia``, the position part of keys, ``[1 | B, H, S, D]``: Wk p of Wk y + Wk p.
    """

    inputs: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    waves: Tensor | None = None

    @property
    def texts(self) -> int:
        """B, the number of texts."""
        return next(part for part in self[:2] if part is not None).shape[0]

    def last(self, size: int) -> "Kept":
        """Return the cache of the last tokens, with the sinusoids of the first positions."""

        def cut(part: Tensor | None) -> Tensor | None:
            return None if part is None else part[..., max(part.shape[-2] - size, 0) :, :]

        waves = None if self.waves is None else self.waves[..., :size, :]
        return Kept(cut(self.inputs), cut(self.k), cut(self.v), waves)

    def reorder(self, index: Tensor) -> "Kept":
        """Return the cache of the texts with indices ``[B']``."""
        shared = self.waves is not None and self.waves.shape[0] == 1
        parts = (part if part is None else part.index_select(0, index) for part in self[:3])
        waves = self.waves if shared or self.waves is None else self.waves.index_select(0, index)
        return Kept(*parts, waves)


@dataclass(frozen=True, eq=False)
class Cache:
    """A cache of all tokens so far with their positions.

    ``Cache()`` is empty, for the start of a text.

    Args:
        layers: the cache of each layer.
        positions: positions of the tokens, ``[S]`` or ``[B, S]``.
        seen: bool ``[B, S]``, False for padding; None: no padding.
    """

    layers: tuple[Kept, ...] = ()
    positions: Tensor | None = None
    seen: Tensor | None = None

    def reorder(self, index: Tensor) -> "Cache":
        """Return the cache of selected texts, as for beam search.

        Args:
            index: integers ``[B']`` from 0 to B - 1; a text may occur more than once.
        """
        own = {
            name: part if part is None or part.dim() == 1 else part.index_select(0, index)
            for name, part in (("positions", self.positions), ("seen", self.seen))
        }
        return replace(self, layers=tuple(kept.reorder(index) for kept in self.layers), **own)

    def pieces(self, length: int) -> Iterator[int]:
        """Yield the sizes of the pieces in which to read the next ``length`` tokens."""
        yield length

    def grown(
        self, layers: tuple[Kept, ...], positions: Tensor, seen: Tensor | None = None
    ) -> "Cache":
        """Return the cache with more tokens."""
        return replace(self, layers=layers, positions=positions, seen=seen)


@dataclass(frozen=True, eq=False, kw_only=True)
class Memory(Cache):
    """A cache of the current block and the last tokens before it (Press et al., 2021).

    A text is read in blocks. At the end of a block, all tokens except the last ``size`` are
    dropped. So the context of a token does not depend on the calls that read the text: it has from
    ``size`` to ``size`` + ``block`` - 1 tokens.

    ``CausalLM.memory`` creates one.

    Args:
        block: tokens of a block.
        size: tokens kept at the end of a block.
        renumber: whether kept tokens get new positions, from 0. Otherwise they keep their
            positions, which is equivalent for relative encodings.
        fresh: tokens of the current block that were read already.
    """

    block: int
    size: int
    renumber: bool
    fresh: int = 0

    def pieces(self, length: int) -> Iterator[int]:
        fresh = self.fresh
        while length:
            piece = min(length, self.block - fresh)
            yield piece
            length, fresh = length - piece, 0

    def grown(
        self, layers: tuple[Kept, ...], positions: Tensor, seen: Tensor | None = None
    ) -> "Memory":
        before = 0 if self.positions is None else self.positions.shape[-1]
        fresh = self.fresh + positions.shape[-1] - before
        if fresh < self.block:
            return replace(self, layers=layers, positions=positions, fresh=fresh)
        layers = tuple(kept.last(self.size) for kept in layers)
        positions = positions[..., max(positions.shape[-1] - self.size, 0) :]
        if self.renumber:
            positions = torch.arange(positions.shape[-1], device=positions.device)
        return replace(self, layers=layers, positions=positions, fresh=0)
