"""ALiBi: a distance penalty with a slope for each head. ``logit - m[h] |i - j|``.

::

    alibi
    alibi,span=4

Distances are Euclidean on a grid. In causal attention ``irpe.attention`` computes it without
materialising a bias, see backends/sdpa.py.

Source: Press et al., Train Short, Test Long, ICLR 2022.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..buckets import BucketIds, OneBucket
from ..fields import number
from ..geometry import Geometry
from ..spec import LayerSize, Spec
from ..terms import Term
from .base import Encoding, register


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Alibi(Spec):
    """A distance penalty with a slope for each head (Press et al., ICLR 2022).

    It is symmetric: earlier and later keys at the same distance get the same penalty. It has no
    parameters.

    Args:
        span: the slope of head h = 1 to H is 2 ** (-span h / H).
    """

    names = {"alibi": {}}
    axes = (1, 2, 3)
    examples = (("alibi", "logit - m[h] |d|", "text, image, video; m[h] = 2^(-8h/H)"),)

    span: float = number(8.0)

    def build(self, size: LayerSize) -> dict[str, Encoding]:
        return {"alibi": LinearBias(self, size)}


def alibi_slopes(num_heads: int, span: float = 8.0) -> tuple[float, ...]:
    """Return the slopes of H heads: ``2 ** (-span h / H)``, h = 1 to H, for a power of two.

    For other H: the slopes of the power of two below H, then every second one of the power above.
    """
    power = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-span * h / power) for h in range(1, power + 1)]
    between = [2.0 ** (-span * h / (2 * power)) for h in range(1, 2 * power + 1, 2)]
    return tuple(slopes + between[: num_heads - power])


class LinearBias(Encoding):
    """ALiBi as a slope term. It has no parameters."""

    anchor: Tensor

    def __init__(self, spec: Alibi, size: LayerSize) -> None:
        super().__init__()
        self.spec, self.slopes = spec, alibi_slopes(size.num_heads, spec.span)
        # Stores the module's device. Slopes are not a buffer: .to(bfloat16) would round them.
        self.register_buffer("anchor", torch.empty(0, device=size.device), persistent=False)

    def terms(self, geometry: Geometry) -> tuple[Term, ...]:
        buckets, device = BucketIds(OneBucket(), geometry), self.anchor.device
        wide = torch.float32 if device.type == "mps" else torch.float64

        def build() -> Tensor:
            return torch.tensor([[-s] for s in self.slopes], dtype=wide, device=device)

        table = geometry.remember(("slopes", self.slopes, device), build)
        return (Term("slope", table, buckets),)

    def extra_repr(self) -> str:
        return f"{self.spec}, heads={len(self.slopes)}"
