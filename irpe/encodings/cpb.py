"""Continuous position bias: a small network maps an offset to a bias for each head.

::

    cpb
    cpb,form=cr,hidden=128
    cpb,window=8

With d the offset query - key on each axis, n the grid's size and u = 8 d / (n - 1)::

    c = sign(u) log2(1 + |u|) / 3          b[h] = 16 sigmoid(mlp(c)[h])             form swin
    c = sign(d) ln(1 + |d|)                b[h] = mlp(c)[h]                          form cr

Source: Liu et al., Swin Transformer V2, CVPR 2022, section 3.3; form ``cr`` is timm's.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..buckets import BucketIds, ImageBuckets
from ..buckets.steps import clip_index
from ..errors import IrpeError
from ..fields import choice, count
from ..geometry import Geometry, Grid
from ..spec import LayerSize, Spec
from ..terms import Term
from .base import Encoding, register


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class CPB(Spec):
    """Log-spaced continuous position bias for grids of any size (Liu et al., CVPR 2022).

    Args:
        form: ``swin``, or ``cr`` (offsets in patches, no sigmoid), as in timm.
        hidden: channels of the network's hidden layer.
        window: side of the training grid, which offsets are divided by; None: the current grid.
    """

    names = {"cpb": {}}
    axes = (2,)
    examples = (("cpb", "logit + 16 sigmoid(mlp(log d))[h]", "image; Swin V2's bias, any size"),)

    form: str = choice("swin", "swin", "cr")
    hidden: int = count(512, always=True)
    window: int | None = count(None, least=2)

    def build(self, size: LayerSize) -> dict[str, Encoding]:
        return {"cpb": ContinuousBias(self, size)}


class ContinuousBias(Encoding):
    """A bias term whose table is the output of a network.

    Parameters:
        fc1 (2 to hidden) and fc2 (hidden to H; with a bias in form cr), as in ``mlp`` of timm's
        ``RelPosMlp``.
    """

    spec: CPB

    def __init__(self, spec: CPB, size: LayerSize) -> None:
        super().__init__()
        self.spec = spec
        self.fc1 = nn.Linear(2, spec.hidden, **size.made)
        self.fc2 = nn.Linear(spec.hidden, size.num_heads, bias=spec.form == "cr", **size.made)

    def terms(self, geometry: Geometry) -> tuple[Term, ...]:
        if not isinstance(geometry, Grid):
            raise IrpeError(f"{self.spec} needs the size of a grid, not {geometry!r}")
        bound = max(geometry.height, geometry.width) - 1
        buckets = BucketIds(ImageBuckets("product", clip_index(bound)), geometry)
        table = self.table(bound, geometry.height, geometry.width)
        if geometry.prefix:  # no bias for pairs with a prefix token
            table = nn.functional.pad(table, (0, 1))
        return (Term("bias", table, buckets),)

    def table(self, bound: int, height: int, width: int) -> Tensor:
        """Return the bias ``[H, (2 bound + 1)^2]`` of all offsets up to a bound."""
        weight = self.fc1.weight
        wide = torch.float32 if weight.device.type == "mps" else torch.float64
        steps = torch.arange(-bound, bound + 1, device=weight.device, dtype=wide)
        axes, swin = [], self.spec.form == "swin"
        for side in (height, width):
            scaled = steps * (8 / max((self.spec.window or side) - 1, 1)) if swin else steps
            logs = scaled.sign() * scaled.abs().log1p()
            axes.append(logs / math.log(8) if swin else logs)
        coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)
        made = self.fc2(torch.relu(self.fc1(coordinates.to(weight.dtype))))
        return (16 * made.sigmoid() if swin else made).t()

    def extra_repr(self) -> str:
        return str(self.spec)
