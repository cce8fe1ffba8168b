"""Step indexes: monotone functions of a distance, stored as the distances where they increase.

They are constant beyond some distance, so a few integers store them exactly, on every device.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepIndex:
    """An odd, monotone index of integer offsets.

    Args:
        steps: ``steps[n]`` is the smallest distance whose index is at least n + 1.
        bound: the largest index in the tables; the largest index in use may be smaller.
    """

    steps: tuple[int, ...]
    bound: int

    @property
    def reach(self) -> int:
        """The distance beyond which the index is constant."""
        return self.steps[-1] if self.steps else 0

    def __call__(self, offsets: Tensor) -> Tensor:
        """Return the signed index of integer offsets, any shape, in [-bound, bound]."""
        steps = torch.tensor(self.steps, dtype=torch.int64, device=offsets.device)
        table = torch.zeros(self.reach + 1, dtype=torch.int64, device=offsets.device)
        table = table.scatter_add(0, steps, torch.ones_like(steps)).cumsum(0)
        return table[offsets.abs().clamp(max=self.reach)] * offsets.sign()


def clip_index(bound: int) -> StepIndex:
    """Return the index of distances clipped at a bound."""
    return StepIndex(tuple(range(1, bound + 1)), bound)


def stored(index: Tensor, bound: int) -> StepIndex:
    """Return a StepIndex of the indexes of the distances 0, 1, 2, ..."""
    steps = torch.searchsorted(index, torch.arange(1, int(index.max()) + 1, device="cpu"))
    return StepIndex(tuple(steps.tolist()), bound)


@lru_cache(maxsize=256)
def piecewise_index(alpha: float, beta: float, gamma: float) -> StepIndex:
    """Return the piecewise index: exact to alpha, logarithmic to gamma, at most beta.

    Source: Wu et al., ICCV 2021, Eq. 18.
    """
    bound = int(beta)
    # The dtype and order of operations of the released tables: other roundings change the buckets
    # of some offsets.
    distances = torch.arange(math.ceil(max(gamma, alpha)) + 2, dtype=torch.float32, device="cpu")
    log = torch.log(distances.clamp(min=1e-3) / alpha) / math.log(gamma / alpha) * (beta - alpha)
    far = (alpha + log).round().clip(max=beta)
    index = torch.where(distances <= alpha, distances, far).to(torch.int64)
    # float32 may round a beta just below an integer up to it.
    return stored(index.clamp(max=bound), bound)
