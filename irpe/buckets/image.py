"""Bucket functions of image relative position encoding (Wu et al., ICCV 2021, section 3.3)."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import IrpeError
from .steps import StepIndex

AXES = ("frames", "rows", "columns")  # of positions; images have the last two


@dataclass(frozen=True, slots=True)
class ImageBuckets:
    """Buckets of (row, column) or (frame, row, column) offsets.

    Args:
        method: ``product``, ``euc``, ``quant``, ``rank``, or one part of ``cross``: ``frames``,
            ``rows`` or ``columns``.
        index: index of offsets on one axis, or of distances.
        ranks: for ``rank``, the rank of each squared distance.
        axes: 2 or 3.
    """

    method: str
    index: StepIndex
    ranks: tuple[int, ...] = ()
    axes: int = 2

    @property
    def size(self) -> int:
        """Number of buckets, without the bucket of prefix tokens."""
        side = 2 * self.index.bound + 1
        return side**self.axes if self.method == "product" else side

    @property
    def opposite(self) -> str:
        """Id of the negated offset: "reversed" (size - 1 - id), or the "same" id."""
        return "reversed" if self.method in ("product", *AXES) else "same"

    def __call__(self, offsets: Tensor) -> Tensor:
        """Return bucket ids int64 ``[...]`` of integer offsets ``[..., A]``."""
        if offsets.shape[-1] != self.axes:
            raise IrpeError(
                f"this encoding was built for {self.axes} axes, {', '.join(AXES[-self.axes :])}, "
                f"not for {offsets.shape[-1]}: build it with axes={offsets.shape[-1]}"
                if offsets.shape[-1] in (2, 3)
                else f"image encodings need (row, column), not {offsets.shape[-1]} axes"
            )
        if offsets.is_floating_point():
            raise IrpeError(f"image encodings need integer positions, not {offsets.dtype}")
        index, bound = self.index, self.index.bound
        # Offsets beyond the reach share a bucket in every method; clamping keeps squares small.
        limit = index.reach + 1
        parts = offsets.to(torch.int64).clamp(-limit, limit).unbind(-1)
        if self.method in AXES:
            return index(parts[AXES[-self.axes :].index(self.method)]) + bound
        if self.method == "product":
            ids = index(parts[0]) + bound
            for part in parts[1:]:
                ids = ids * (2 * bound + 1) + index(part) + bound
            return ids
        distances = parts[0] * parts[0]  # squared, as in quant
        for part in parts[1:]:
            distances = distances + part * part
        if self.method == "euc":
            distances = _rounded_root(distances)
        elif self.method == "rank":
            ranks = torch.tensor(self.ranks, device=distances.device)
            distances = ranks[distances.clamp(max=len(self.ranks) - 1)]
        return index(distances) + bound


def _rounded_root(squared: Tensor) -> Tensor:
    """Return the exact round(sqrt(n)) of integers; float square roots differ by device."""
    root = squared.to(torch.float32).sqrt().round().to(torch.int64)
    root = (root - (squared <= root * root - root).to(torch.int64)).clamp(min=0)
    return root + (squared > root * root + root).to(torch.int64)


@lru_cache(maxsize=64)
def ranks(reach: int) -> tuple[int, ...]:
    """Return the rank of each squared distance among 0, 1, 2, 4, 5, 8, ..., up to rank ``reach``.

    The ranks are among all sums of two squares, so that an offset has the same rank in every grid.
    Other numbers have the rank below, and are never looked up.
    """
    limit = 8 * reach + 16  # more than ``reach`` numbers up to it are sums of two squares
    squares = torch.arange(math.isqrt(limit) + 1, device="cpu").square()
    present = torch.unique(squares.unsqueeze(1) + squares)[: reach + 1]
    numbers = torch.arange(int(present[-1]) + 1, device="cpu")
    return tuple((torch.searchsorted(present, numbers, right=True) - 1).tolist())
