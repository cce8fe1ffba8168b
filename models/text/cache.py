"""What a language model remembers of the tokens that it has read.

Both kinds are values: going on from one gives a new one, and the old one stays as it is.

Shapes: B texts, H heads, S tokens remembered, C channels, D of a head.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Kept(NamedTuple):
    """What one layer keeps of the tokens it has seen; nothing of it passes gradients on.

    While gradients are computed that is the layer's inputs, which the next step's weights project
    and learn from; else it is what was projected.

    Attributes:
        inputs: of the projections, ``[B, S, C]``; the others are None then.
        k: keys ``[B, H, S, D]``, after all that an encoding does to them; with ``pia`` those of
            the content alone. v: values ``[B, H, S, D]``.
        waves: with ``pia``, what joins the keys, ``[1 | B, H, S, D]``: Wk p of (Wk y + Wk p).
    """

    inputs: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    waves: Tensor | None = None

    @property
    def texts(self) -> int:
        """B."""
        return next(part for part in self[:2] if part is not None).shape[0]

    def last(self, size: int) -> "Kept":
        """The last tokens; sinusoids those of the first places."""

        def cut(part: Tensor | None) -> Tensor | None:
            return None if part is None else part[..., max(part.shape[-2] - size, 0) :, :]

        waves = None if self.waves is None else self.waves[..., :size, :]
        return Kept(cut(self.inputs), cut(self.k), cut(self.v), waves)


@dataclass(frozen=True, eq=False)
class Cache:
    """All tokens so far, each at the position that it had.

    ``Cache()`` remembers nothing: a text begins with it.

    Args:
        layers: what each layer keeps. positions: of the tokens, ``[S]`` or ``[B, S]``.
    """

    layers: tuple[Kept, ...] = ()
    positions: Tensor | None = None

    def pieces(self, length: int) -> Iterator[int]:
        """In which pieces the next ``length`` tokens are to be read."""
        yield length

    def grown(self, layers: tuple[Kept, ...], positions: Tensor) -> "Cache":
        """What is remembered after more tokens: all of them."""
        return replace(self, layers=layers, positions=positions)


@dataclass(frozen=True, eq=False, kw_only=True)
class Memory(Cache):
    """Tokens of the block that is being read, and the last few before it (Press et al., 2021).

    A text is read in blocks, whatever pieces it comes in. Where a block ends, all but the last
    ``size`` tokens are forgotten. So a token that is read by itself sees just what it would see in
    a block that came whole: itself, and from ``size`` to ``size`` + ``block`` - 1 tokens before.

    ``CausalLM.memory`` makes one.

    Args:
        block: tokens of a block. size: tokens remembered when one ends.
        anew: whether those are placed anew then, from position 0 on; else they stay where they
            are, which is the same for encodings that see nothing but distances.
        fresh: tokens of the block that were read already.
    """

    block: int
    size: int
    anew: bool
    fresh: int = 0

    def pieces(self, length: int) -> Iterator[int]:
        fresh = self.fresh
        while length:
            piece = min(length, self.block - fresh)
            yield piece
            length, fresh = length - piece, 0

    def grown(self, layers: tuple[Kept, ...], positions: Tensor) -> "Memory":
        before = 0 if self.positions is None else self.positions.shape[-1]
        fresh = self.fresh + positions.shape[-1] - before
        if fresh < self.block:
            return replace(self, layers=layers, positions=positions, fresh=fresh)
        layers = tuple(kept.last(self.size) for kept in layers)
        positions = positions[..., max(positions.shape[-1] - self.size, 0) :]
        if self.anew:
            positions = torch.arange(positions.shape[-1], device=positions.device)
        return replace(self, layers=layers, positions=positions, fresh=0)
