"""LookHere: attention heads with a direction each, and a distance penalty.

::

    lookhere
    lookhere,fov=180,slope=2.5

``logit -= slope m[h] |d|`` for keys in the field of view of head h; other keys are masked. The last
third of the heads has no direction. There are no parameters. In the paper ``slope`` decreases from
3 in the first layer to 1 in the last one::

    irpe.attach(model, {f"blocks.{n}.attn": f"lookhere,slope={3 - 2 * n / 11}" for n in range(12)})

Source: Fuller et al., LookHere: Vision Transformers with Directed Attention Generalize and
Extrapolate, NeurIPS 2024.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..buckets import BucketIds, ImageBuckets
from ..buckets.steps import clip_index
from ..errors import IrpeError
from ..fields import choice, number
from ..geometry import Geometry, Grid
from ..spec import LayerSize, Spec
from ..terms import Term
from .base import Encoding, register

HIDDEN = -30000.0  # probability 0 after the softmax; finite in float16
# Directions (row, column) of the heads, in the authors' order: up, down, left, right, diagonals.
SIDES = ((-1, 0), (1, 0), (0, -1), (0, 1))
DIAGONALS = ((-1, 1), (-1, -1), (1, 1), (1, -1))


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class LookHere(Spec):
    """Directed heads with a distance penalty (Fuller et al., NeurIPS 2024).

    Args:
        fov: field of view of a directed head, in degrees: ``180``, ``90`` or ``45``.
        slope: slope of the layer; directed heads multiply it by 1/2, the others by 1/4, 1/16, 1/64
            or 1/256.
    """

    names = {"lookhere": {}}
    axes = (2,)
    examples = (
        ("lookhere", "logit - s m[h] |d|, in view of h", "image; for larger images than trained"),
    )

    fov: str = choice("90", "180", "90", "45")
    slope: float = number(2.0)

    def build(self, size: LayerSize) -> dict[str, Encoding]:
        return {"lookhere": DirectedBias(self, size)}


class DirectedBias(Encoding):
    """A bias term with a constant table. It has no parameters."""

    spec: LookHere
    anchor: Tensor

    def __init__(self, spec: LookHere, size: LayerSize) -> None:
        super().__init__()
        self.spec, self.num_heads = spec, size.num_heads
        # Stores the module's device and dtype.
        self.register_buffer("anchor", torch.empty(0, **size.made), persistent=False)

    def terms(self, geometry: Geometry) -> tuple[Term, ...]:
        if not isinstance(geometry, Grid):
            raise IrpeError(f"{self.spec} needs the size of a grid, not {geometry!r}")
        bound = max(geometry.height, geometry.width) - 1
        device, dtype = self.anchor.device, self.anchor.dtype

        def build() -> Tensor:
            table = penalties(self.spec, self.num_heads, bound)
            if geometry.prefix:  # none for pairs with a prefix token
                table = torch.nn.functional.pad(table, (0, 1))
            return table.to(device, dtype)

        key = ("lookhere", self.spec, self.num_heads, device, dtype)
        buckets = BucketIds(ImageBuckets("product", clip_index(bound)), geometry)
        return (Term("bias", geometry.remember(key, build), buckets),)

    def extra_repr(self) -> str:
        return f"{self.spec}, heads={self.num_heads}"


def penalties(spec: LookHere, num_heads: int, bound: int) -> Tensor:
    """Return the bias ``[H, (2 bound + 1)^2]`` of all offsets query - key, float64 on the CPU."""
    steps = torch.arange(-bound, bound + 1, dtype=torch.float64, device="cpu")
    # Offsets key - query.
    rows, columns = (-x.flatten() for x in torch.meshgrid(steps, steps, indexing="ij"))
    far = (rows * rows + columns * columns).sqrt()
    undirected = num_heads // 3 if num_heads > 2 else 0
    table = []
    for head in range(num_heads - undirected):
        in_view = views(spec.fov, rows, columns)[head % 8]
        penalty = -spec.slope * far / 2 ** (1 + head // 8)
        table.append(penalty.masked_fill(~in_view, HIDDEN))
    table += [-spec.slope * far / 4 ** (1 + n % 4) for n in range(undirected)]
    return torch.stack(table)


def views(fov: str, rows: Tensor, columns: Tensor) -> list[Tensor]:
    """Return masks of the keys in view for eight directions, of offsets key - query."""
    halves = [rows * y + columns * x >= 0 for y, x in (*SIDES, *DIAGONALS)]
    quarters = [rows * y + columns * x >= (rows * x + columns * y).abs() for y, x in SIDES]
    up, down, left, right = halves[:4]
    north, south, west, east = quarters
    match fov:
        case "180":
            return halves
        case "90":
            return [up & left, up & right, down & left, down & right, *quarters]
    first = [north & left, south & left, west & up, east & up]
    return [*first, north & right, south & right, west & down, east & down]
