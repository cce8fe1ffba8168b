"""Bucket functions of one axis: clipped offsets (Shaw, Huang) and logarithmic ones (T5)."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import IrpeError
from ..spec import T5
from .piecewise import StepIndex


@dataclass(frozen=True, slots=True)
class ClipBuckets:
    """Offsets clipped to [-clip, clip], or distances to [0, clip] where they are not signed."""

    clip: int
    signed: bool = True

    @property
    def size(self) -> int:
        """Number of buckets, the one of prefix tokens left out."""
        return 2 * self.clip + 1 if self.signed else self.clip + 1

    @property
    def opposite(self) -> str:
        """Id of the negated offset: "reversed" (size - 1 - id), or the "same" id."""
        return "reversed" if self.signed else "same"

    def __call__(self, offsets: Tensor) -> Tensor:
        """Bucket ids int64 ``[...]`` of integer offsets ``[..., 1]``."""
        clipped = one_axis(offsets).clamp(-self.clip, self.clip)
        return clipped + self.clip if self.signed else clipped.abs()


@dataclass(frozen=True, slots=True)
class LogBuckets:
    """T5's buckets: a step index of the distance, later keys in the upper half or in bucket 0.

    Args:
        index: of distances. bidirectional: whether later keys have buckets of their own.
    """

    index: StepIndex
    bidirectional: bool

    @property
    def size(self) -> int:
        """Number of buckets, the one of prefix tokens left out."""
        return (self.index.bound + 1) * (2 if self.bidirectional else 1)

    def __call__(self, offsets: Tensor) -> Tensor:
        """Bucket ids int64 ``[...]`` of integer offsets ``[..., 1]``, query - key."""
        offsets = one_axis(offsets)
        if not self.bidirectional:
            return self.index(offsets.clamp(min=0))
        return self.index(offsets.abs()) + (offsets < 0).to(torch.int64) * (self.size // 2)


@dataclass(frozen=True, slots=True)
class OneBucket:
    """All offsets in bucket 0: for a term that takes the distance itself."""

    @property
    def size(self) -> int:
        """Number of buckets, the one of prefix tokens left out."""
        return 1

    def __call__(self, offsets: Tensor) -> Tensor:
        """Zeros int64 ``[...]`` for offsets ``[..., A]``."""
        return torch.zeros_like(offsets[..., 0], dtype=torch.int64)


@lru_cache(maxsize=64)
def log_buckets(spec: T5, bidirectional: bool) -> LogBuckets:
    """The bucket function of a T5 spec."""
    count = spec.buckets // 2 if bidirectional else spec.buckets
    exact = count // 2
    if spec.max <= exact:
        raise IrpeError(
            f"{spec}: max={spec.max} must be more than {exact}, the distances that have a bucket "
            "of their own"
        )
    # In float32 and in this order, as T5 computes it: other roundings move distances that fall
    # between two buckets.
    distances = torch.arange(spec.max + 1, dtype=torch.float32, device="cpu")
    log = torch.log(distances.clamp(min=1e-3) / exact) / math.log(spec.max / exact)
    far = exact + (log * (count - exact)).to(torch.int64)
    index = torch.where(distances < exact, distances.to(torch.int64), far.clamp(max=count - 1))
    steps = torch.searchsorted(index, torch.arange(1, int(index.max()) + 1, device="cpu"))
    return LogBuckets(StepIndex(tuple(steps.tolist()), count - 1), bidirectional)


def one_axis(offsets: Tensor) -> Tensor:
    """int64 ``[...]`` of integer offsets ``[..., 1]``."""
    if offsets.shape[-1] != 1:
        raise IrpeError(
            f"text encodings need positions on one axis, not {offsets.shape[-1]}: "
            "make an irpe.Sequence"
        )
    if offsets.is_floating_point():
        raise IrpeError(f"this encoding needs integer positions, not {offsets.dtype}")
    return offsets.squeeze(-1).to(torch.int64)
