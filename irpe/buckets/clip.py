"""Bucket functions of one axis: clipped offsets, and one bucket for all."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import IrpeError


@dataclass(frozen=True, slots=True)
class ClipBuckets:
    """Offsets clipped to [-clip, clip].

    Args:
        clip: distances of at least ``clip`` share a bucket.
        signed: whether earlier and later keys have different buckets; else distances are clipped
            to [0, clip].
    """

    clip: int
    signed: bool = True

    @property
    def size(self) -> int:
        """Number of buckets, without the bucket of prefix tokens."""
        return 2 * self.clip + 1 if self.signed else self.clip + 1

    @property
    def opposite(self) -> str:
        """Id of the negated offset: "reversed" (size - 1 - id), or the "same" id."""
        return "reversed" if self.signed else "same"

    def __call__(self, offsets: Tensor) -> Tensor:
        """Return bucket ids int64 ``[...]`` of integer offsets ``[..., 1]``."""
        clipped = one_axis(offsets).clamp(-self.clip, self.clip)
        return clipped + self.clip if self.signed else clipped.abs()


@dataclass(frozen=True, slots=True)
class OneBucket:
    """All offsets in bucket 0, for slope terms, which use distances."""

    @property
    def size(self) -> int:
        """Number of buckets, without the bucket of prefix tokens."""
        return 1

    def __call__(self, offsets: Tensor) -> Tensor:
        """Return zeros int64 ``[...]`` for offsets ``[..., A]``."""
        return torch.zeros_like(offsets[..., 0], dtype=torch.int64)


def one_axis(offsets: Tensor) -> Tensor:
    """Return int64 ``[...]`` of integer offsets ``[..., 1]``."""
    if offsets.shape[-1] != 1:
        raise IrpeError(
            f"text encodings need positions on one axis, not {offsets.shape[-1]}: "
            "make an irpe.Sequence"
        )
    if offsets.is_floating_point():
        raise IrpeError(f"this encoding needs integer positions, not {offsets.dtype}")
    return offsets.squeeze(-1).to(torch.int64)
