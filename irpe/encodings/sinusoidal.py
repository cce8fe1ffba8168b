"""Sinusoids added to the tokens at a model's input. ``x + sin, cos(i / base^(2t/C))``.

::

    sinusoidal
    sinusoidal,form=fairseq

Source: Vaswani et al., Attention Is All You Need, 2017; fairseq's code.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import IrpeError
from ..fields import choice, number
from ..geometry import Geometry
from ..spec import LayerSize, Spec
from .base import Encoding, register


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Sinusoidal(Spec):
    """Sinusoids added at a model's input.

    Args:
        form: ``paper`` (Vaswani et al., 2017: alternating sines and cosines, base ** (-2t / C)) or
            ``fairseq`` (all sines, then all cosines, base ** (-t / (C / 2 - 1))).
        base: base of the frequencies.
    """

    names = {"sinusoidal": {}}
    at_input = True
    examples = (("sinusoidal", "x + sin, cos(i / base^(2t/C))", "at the model's input"),)

    form: str = choice("paper", "paper", "fairseq")
    base: float = number(10000.0, most=1e12)

    def build(self, size: LayerSize) -> dict[str, Encoding]:
        return {"sinusoidal": SinusoidalEmbedding(self, size)}


class Waves(Encoding):
    """Sinusoids of positions, for ``sinusoidal`` and ``pia``. They have no parameters."""

    spec: Any

    def __init__(self, spec: Any, size: LayerSize) -> None:
        super().__init__()
        self.spec, self.dim = spec, size.dim

    def waves(self, geometry: Geometry, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return sinusoids of queries ``[(B,) L, C]`` and keys ``[(B,) S, C]``; 0 for prefixes.

        Device and dtype are those of ``like``.
        """
        spec = self.spec
        check_one_axis(spec, geometry)

        def side(positions: Tensor, prefix: int) -> Tensor:
            made = sinusoids(positions.squeeze(-1), self.dim, spec.form, spec.base, like.dtype)
            return F.pad(made, (0, 0, prefix, 0))

        def build() -> tuple[Tensor, Tensor]:
            query, key = geometry.positions(like.device)
            on_q = side(query, geometry.prefix)
            same = key is query and geometry.key_prefix == geometry.prefix
            return on_q, on_q if same else side(key, geometry.key_prefix)

        key = ("waves", spec.form, spec.base, self.dim, like.device, like.dtype)
        made: tuple[Tensor, Tensor] = geometry.remember(key, build)
        return made


class SinusoidalEmbedding(Waves):
    """Sinusoids added to the tokens at a model's input; prefix tokens get none."""

    def embed(self, x: Tensor, geometry: Geometry) -> Tensor:
        on_x, _ = self.waves(geometry, x)
        geometry.check(x.shape[0], x.shape[1])
        return x + on_x


def sinusoids(positions: Tensor, dim: int, form: str, base: float, dtype: torch.dtype) -> Tensor:
    """Return sinusoids ``[..., L, C]`` of positions ``[..., L]``, see ``Sinusoidal``.

    In form ``fairseq``, the last channel of an odd C is 0.
    """
    wide = torch.float32 if positions.device.type == "mps" else torch.float64
    planes = (dim + 1) // 2 if form == "paper" else dim // 2
    span = dim / 2 if form == "paper" else max(planes - 1, 1)
    t = torch.arange(planes, dtype=wide, device=positions.device)
    angles = positions.to(wide).unsqueeze(-1) * base ** (-t / span)
    if form == "paper":
        made = torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)[..., :dim]
    else:
        made = torch.cat((angles.sin(), angles.cos()), -1)
        made = F.pad(made, (0, dim - 2 * planes))
    return made.to(dtype)


def check_one_axis(spec: Spec, geometry: Geometry) -> None:
    """Raise IrpeError if ``geometry`` is not a geometry with one axis."""
    if not isinstance(geometry, Geometry):
        raise IrpeError(f"geometry={geometry!r} is not a geometry: make an irpe.Sequence")
    if geometry.axes != 1:
        raise IrpeError(f"{spec} needs positions on one axis, but {geometry!r} has {geometry.axes}")
