"""The four methods of image relative position encoding (Wu et al., section 3.3)."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import IrpeError
from ..spec import RPE
from .piecewise import StepIndex, step_index


@dataclass(frozen=True, slots=True)
class ImageBuckets:
    """A function from (row, column) offsets to bucket ids.

    ``method`` is a spec's, with ``cross`` split into ``rows`` and ``columns``; ``ranks`` holds the
    rank of each squared distance, for method ``rank``.
    """

    method: str
    index: StepIndex
    ranks: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Number of buckets, the one of prefix tokens left out."""
        side = 2 * self.index.bound + 1
        return side * side if self.method == "product" else side

    @property
    def opposite(self) -> str:
        """Id of the negated offset: "reversed" (size - 1 - id), or the "same" id."""
        return "reversed" if self.method in ("product", "rows", "columns") else "same"

    def __call__(self, offsets: Tensor) -> Tensor:
        """Bucket ids int64 ``[...]`` of integer offsets ``[..., 2]``."""
        if offsets.shape[-1] != 2:
            raise IrpeError(f"image encodings need (row, column), not {offsets.shape[-1]} axes")
        if offsets.is_floating_point():
            raise IrpeError(f"image encodings need integer positions, not {offsets.dtype}")
        index, bound = self.index, self.index.bound
        # What lies past the reach on one axis is past it altogether; clamped, squares stay small.
        limit = index.reach + 1
        rows, columns = offsets.to(torch.int64).clamp(-limit, limit).unbind(-1)
        match self.method:
            case "rows":
                return index(rows) + bound
            case "columns":
                return index(columns) + bound
            case "product":
                return (index(rows) + bound) * (2 * bound + 1) + index(columns) + bound
        squared = rows * rows + columns * columns
        match self.method:
            case "euc":
                return index(_rounded_root(squared)) + bound
            case "quant":
                return index(squared) + bound
            case "rank":
                ranks = torch.tensor(self.ranks, device=squared.device)
                return index(ranks[squared.clamp(max=len(self.ranks) - 1)]) + bound
        raise IrpeError(f"unknown method {self.method!r}")


def image_buckets(spec: RPE) -> tuple[ImageBuckets, ...]:
    """The bucket functions of a spec: (rows, columns) for ``cross``, else one."""
    methods = ("rows", "columns") if spec.method == "cross" else (spec.method,)
    index = step_index(spec)
    ranks = _ranks(index.reach) if spec.method == "rank" else ()
    return tuple(ImageBuckets(method, index, ranks) for method in methods)


def _rounded_root(squared: Tensor) -> Tensor:
    """round(sqrt(n)) of integers; corrected in integers, since square roots differ by device."""
    root = squared.to(torch.float32).sqrt().round().to(torch.int64)
    root = (root - (squared <= root * root - root).to(torch.int64)).clamp(min=0)
    return root + (squared > root * root + root).to(torch.int64)


@lru_cache(maxsize=64)
def _ranks(reach: int) -> tuple[int, ...]:
    """Rank of squared distances among all that integer offsets can have: 0, 1, 2, 4, 5, 8, ...

    Counted over the whole plane and not over one grid, so that an offset has the same rank in
    every grid. Goes on until the rank ``reach``; numbers between two squared distances get the
    lower one's rank, and are never looked up.
    """
    limit = 4 * reach + 16
    while True:
        present = [False] * (limit + 1)
        root = int(limit**0.5) + 1
        for row in range(root):
            for column in range(row, root):
                if row * row + column * column <= limit:
                    present[row * row + column * column] = True
        if sum(present) > reach:
            break
        limit *= 2
    ranks, rank = [], -1
    for is_distance in present:
        rank += is_distance
        ranks.append(rank)
        if rank == reach:
            break
    return tuple(ranks)
