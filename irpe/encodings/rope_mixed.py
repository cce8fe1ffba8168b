"""Mixed rotary embedding of images and videos: learned frequencies of all axes, for each head.

::

    rope-mixed

Source: Heo et al., Rotary Position Embedding for Vision Transformer, ECCV 2024, Eq. 7.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import IrpeError
from ..fields import choice, number
from ..geometry import Geometry
from ..spec import LayerSize, Spec
from .base import Encoding, register
from .rotation import LAYOUTS, check_sizes, cos_sin, powers, rotate


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class RopeMixed(Spec):
    """Learned frequencies of all axes, for each head (Heo et al., ECCV 2024).

    Args:
        layout: see ``Rope``.
        base: frequencies are initialised to base ** (-4t / D), in random directions.
    """

    names = {"rope-mixed": {}}
    axes = (2, 3)
    examples = (("rope-mixed", "q R(y, x) . R(y', x') k", "image; learned frequencies"),)

    layout: str = choice("interleaved", *LAYOUTS)
    base: float = number(10.0, most=1e12)

    def build(self, size: LayerSize) -> dict[str, Encoding]:
        return {"rope": MixedRotary(self, size)}


class MixedRotary(Encoding):
    """Queries and keys rotated by learned frequencies.

    Parameters:
        frequencies ``[A, H, D / 2]``, radians per position, by (frame,) row, column; without
        weight decay.
    """

    decays = False
    spec: RopeMixed

    def __init__(self, spec: RopeMixed, size: LayerSize) -> None:
        super().__init__()
        if size.axes not in spec.axes:
            raise IrpeError(f"axes={size.axes}: {spec} takes positions of 2 or 3 numbers")
        even, least = (4, 4) if size.axes == 2 else (2, 6)
        if size.head_dim % even or size.head_dim < least:
            raise IrpeError(
                f"{spec} needs a head_dim that is a multiple of {even}, at least {least} on "
                f"{size.axes} axes, not {size.head_dim}"
            )
        self.spec = spec
        shape = (size.axes, size.num_heads, size.head_dim // 2)
        self.frequencies = nn.Parameter(torch.empty(shape, **size.made))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the frequencies; call it after ``to_empty`` if built on the meta device."""
        axes, heads, planes = self.frequencies.shape
        if not self.frequencies.is_meta:
            with torch.no_grad():
                made = mixed_frequencies(self.spec.base, 2 * planes, heads, axes)
                self.frequencies.copy_(made)

    def transform(self, q: Tensor, k: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        axes, heads, planes = self.frequencies.shape
        check_sizes(self, q, k, geometry, 2 * planes, heads)
        if geometry.axes != axes:
            raise IrpeError(
                f"{self.spec} was built for {axes} axes, and {geometry!r} has {geometry.axes}: "
                f"build it with axes={geometry.axes}"
            )
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        # Explicit positions may be large, and need float64. The positions of a grid are small;
        # float32 is faster, and learned frequencies are recomputed at every step.
        wide = torch.float64 if geometry.explicit and q.device.type != "mps" else dtype
        on_q, on_k = cos_sin(geometry, self.frequencies.transpose(0, 1).to(wide), 1.0, dtype)
        layout = self.spec.layout
        return rotate(q, on_q[0], on_q[1], layout), rotate(k, on_k[0], on_k[1], layout)


def mixed_frequencies(base: float, head_dim: int, num_heads: int, axes: int = 2) -> Tensor:
    """Return initial frequencies ``[A, H, D / 2]``, in random directions.

    Each head has two random orthogonal directions, for half of its channels each; on three axes
    three directions, for a third of the channels each.
    """
    if axes == 2:
        some = powers(base, head_dim // 4)
        angle = torch.rand(num_heads, 1, dtype=torch.float64, device="cpu") * 2 * math.pi
        turned = angle + math.pi / 2
        rows = torch.cat((some * angle.sin(), some * turned.sin()), -1)
        columns = torch.cat((some * angle.cos(), some * turned.cos()), -1)
        return torch.stack((rows, columns))
    planes = head_dim // 2
    each = -(-planes // axes)
    drawn = torch.randn(num_heads, axes, axes, dtype=torch.float64, device="cpu")
    directions, _ = torch.linalg.qr(drawn)  # [H, A, direction]
    some = powers(base, each).repeat(axes)
    return (directions.permute(1, 0, 2).repeat_interleave(each, -1) * some)[..., :planes]
