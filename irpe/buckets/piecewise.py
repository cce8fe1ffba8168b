"""The piecewise and the clip index (Wu et al., Eq. 18), held as the distances where they step up.

Both grow with the distance and stay constant from some distance on, so a few integers say all
about them, exactly, on every device.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..spec import RPE


@dataclass(frozen=True, slots=True)
class StepIndex:
    """An odd, monotone index of integer offsets.

    Args:
        steps: ``steps[n]`` is the smallest distance whose index is at least n + 1.
        bound: int(beta), the largest index that has a row in the tables. It can be larger than
            the largest index in use.
    """

    steps: tuple[int, ...]
    bound: int

    @property
    def reach(self) -> int:
        """All distances from this one on share their index."""
        return self.steps[-1] if self.steps else 0

    def __call__(self, offsets: Tensor) -> Tensor:
        """Signed index of integer offsets, any shape, in [-bound, bound]."""
        steps = torch.tensor(self.steps, dtype=torch.int64, device=offsets.device)
        table = torch.zeros(self.reach + 1, dtype=torch.int64, device=offsets.device)
        table = table.scatter_add(0, steps, torch.ones_like(steps)).cumsum(0)
        return table[offsets.abs().clamp(max=self.reach)] * offsets.sign()


@lru_cache(maxsize=256)
def step_index(spec: RPE) -> StepIndex:
    """The index function of a spec."""
    alpha, beta, gamma = spec.coefficients
    bound = int(beta)
    if spec.index == "clip":
        return StepIndex(tuple(range(1, bound + 1)), bound)
    # In float32 and in this order of operations, as the released tables were trained: other
    # roundings move offsets that fall between two buckets.
    distances = torch.arange(math.ceil(max(gamma, alpha)) + 2, dtype=torch.float32, device="cpu")
    log = torch.log(distances.clamp(min=1e-3) / alpha) / math.log(gamma / alpha) * (beta - alpha)
    far = (alpha + log).round().clip(max=beta)
    index = torch.where(distances <= alpha, distances, far).to(torch.int64)
    index = index.clamp(max=bound)  # float32 can round a beta just below an integer up to it
    steps = torch.searchsorted(index, torch.arange(1, int(index.max()) + 1, device="cpu"))
    return StepIndex(tuple(steps.tolist()), bound)
