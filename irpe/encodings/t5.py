"""T5's bias: a scalar for each head and bucket of distances. ``logit + b[h, n(i - j)]``.

::

    t5,buckets=32,max=128

Source: Raffel et al., Exploring the Limits of Transfer Learning, 2020, arXiv 1910.10683; T5's code.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from ..buckets import StepIndex
from ..buckets.clip import one_axis
from ..buckets.steps import stored
from ..errors import IrpeError
from ..fields import count, flag
from ..geometry import Geometry
from ..spec import LayerSize, Spec
from ..terms import Term
from .base import Encoding, TableEncoding, register


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class T5(Spec):
    """A bias for each head and bucket of distances (Raffel et al., 2020, arXiv 1910.10683).

    Args:
        buckets: number of buckets; if bidirectional, half of them for each direction. In each
            direction, half of the buckets hold one distance each, the others are log-spaced.
        max: distances of at least ``max`` share the last bucket.
        bidirectional: whether later keys have separate buckets; None: if the attention is not
            causal.
    """

    names = {"t5": {}}
    neutral = True
    examples = (("t5,buckets=32,max=128", "logit + b[h, n(d)]", "buckets grow with log |d|"),)

    buckets: int = count(32, least=2, always=True)
    max: int = count(128, always=True)
    bidirectional: bool | None = flag(None)

    def check(self) -> None:
        exact = self.buckets // (2 if self.bidirectional is False else 4)
        if self.buckets % 4 or self.max <= exact:
            raise IrpeError(
                f"buckets={self.buckets} and max={self.max}: buckets must be a multiple of 4, and "
                f"max more than {exact}, the number of buckets of one distance"
            )

    def build(self, size: LayerSize) -> dict[str, Encoding]:
        return {"t5": T5Bias(self, size)}


@dataclass(frozen=True, slots=True)
class LogBuckets:
    """T5's buckets: a step index of the distance.

    Args:
        index: maps distances to buckets.
        bidirectional: whether later keys are in the upper half of the buckets; else in bucket 0.
    """

    index: StepIndex
    bidirectional: bool

    @property
    def size(self) -> int:
        """Number of buckets, without the one of prefix tokens."""
        return (self.index.bound + 1) * (2 if self.bidirectional else 1)

    def __call__(self, offsets: Tensor) -> Tensor:
        """Return bucket ids int64 ``[...]`` of integer offsets ``[..., 1]``, query - key."""
        offsets = one_axis(offsets)
        if not self.bidirectional:
            return self.index(offsets.clamp(min=0))
        return self.index(offsets.abs()) + (offsets < 0).to(torch.int64) * (self.size // 2)


@lru_cache(maxsize=64)
def log_buckets(spec: T5, bidirectional: bool) -> LogBuckets:
    """Return the bucket function of a T5 spec."""
    count = spec.buckets // 2 if bidirectional else spec.buckets
    exact = count // 2
    if spec.max <= exact:
        raise IrpeError(
            f"{spec}: max={spec.max} must be more than {exact}, the number of buckets of one "
            "distance"
        )
    # The dtype and order of T5's code: other roundings change the buckets of some distances.
    distances = torch.arange(spec.max + 1, dtype=torch.float32, device="cpu")
    log = torch.log(distances.clamp(min=1e-3) / exact) / math.log(spec.max / exact)
    far = exact + (log * (count - exact)).to(torch.int64)
    index = torch.where(distances < exact, distances.to(torch.int64), far.clamp(max=count - 1))
    return LogBuckets(stored(index, count - 1), bidirectional)


class T5Bias(TableEncoding):
    """T5's bias; one module for all layers.

    Parameters (initialised to zero):
        table ``[H, N]``.
    """

    one_for_all = True

    def __init__(self, spec: T5, size: LayerSize) -> None:
        both = not size.causal if spec.bidirectional is None else spec.bidirectional
        super().__init__(spec, size, log_buckets(spec, both))
        self.table = nn.Parameter(torch.zeros(size.num_heads, self.num_buckets, **size.made))

    def terms(self, geometry: Geometry) -> tuple[Term, ...]:
        return (Term("bias", self.table, self.buckets(geometry)),)
