"""Rotations of queries and keys, for ``rope``, ``rope-axial`` and ``rope-mixed``.

Queries and keys are rotated by their positions, so that their dot products depend only on offsets.
An angle is the sum over axes of position times frequency. Angles increase with absolute positions,
so they are computed in float64; cosines and sines are float32, or float64 for float64 inputs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..errors import IrpeError
from ..geometry import Geometry
from ..spec import LayerSize
from .base import Encoding

LAYOUTS = ("interleaved", "half")


class Rotary(Encoding):
    """Queries and keys rotated by fixed frequencies (Su et al., 2021; Heo et al., 2024).

    It has no parameters and no buffers. Cosines and sines are computed once for all layers and
    equal geometries. Prefix tokens are not rotated.

    Args:
        spec: a spec with ``layout`` and ``frequencies(head_dim)``, which returns radians per
            position ``[A, R / 2]`` in float64, and a factor of cosines and sines. If
            ``by_length`` is True, its second argument is the largest position plus 1.
        size: sizes of the layer.
    """

    spec: Any

    def __init__(self, spec: Any, size: LayerSize) -> None:
        super().__init__()
        self.spec, self.head_dim = spec, size.head_dim
        self.frequencies(size.axes)  # validates early

    def frequencies(self, axes: int, length: Tensor | None = None) -> tuple[Tensor, float]:
        """Return frequencies for positions of ``axes`` numbers, and the factor of the tables."""
        given = () if length is None else (length,)
        made: tuple[Tensor, float] = self.spec.frequencies(self.head_dim, *given)
        return made

    def tables(self, geometry: Geometry, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``cos_sin`` on the device of ``like``; float64 if ``like`` is, else float32."""
        key = ("rotary", self.spec, self.head_dim, like.device, like.dtype == torch.float64)
        tables: tuple[Tensor, Tensor] = geometry.remember(key, lambda: self.compute(geometry, like))
        return tables

    def compute(
        self, geometry: Geometry, like: Tensor, move: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return ``tables``; ``move`` is passed to ``coordinates``."""
        by_length = getattr(self.spec, "by_length", False)
        length = _length(geometry, like.device) if by_length else None
        frequencies, factor = self.frequencies(geometry.axes, length)
        wide = torch.float32 if like.device.type == "mps" else torch.float64
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32

        def place(positions: Tensor) -> Tensor:
            return self.coordinates(positions, geometry, move)

        return cos_sin(geometry, frequencies.to(like.device, wide), factor, dtype, place)

    def coordinates(self, positions: Tensor, geometry: Geometry, move: Tensor | None) -> Tensor:
        """Return the coordinates ``[(B,) L', A]`` of positions, to multiply with frequencies."""
        return positions

    def transform(self, q: Tensor, k: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        check_sizes(self, q, k, geometry, self.head_dim)
        (cos_q, sin_q), (cos_k, sin_k) = (t.unbind(0) for t in self.tables(geometry, q))
        layout = self.spec.layout
        return rotate(q, cos_q, sin_q, layout), rotate(k, cos_k, sin_k, layout)

    def extra_repr(self) -> str:
        return f"{self.spec}, head_dim={self.head_dim}"


def _length(geometry: Geometry, device: torch.device) -> Tensor:
    """Return the largest position plus 1 as a scalar; 0 if there are no positions."""
    wide = torch.float32 if device.type == "mps" else torch.float64
    ends = [p.amax().to(wide) + 1 for p in geometry.positions(device) if p.numel()]
    return torch.stack(ends).amax() if ends else torch.zeros((), dtype=wide, device=device)


def powers(base: float, count: int) -> Tensor:
    """Return ``base ** (-t / count)`` for t from 0, float64 on the CPU."""
    return base ** (-torch.arange(count, dtype=torch.float64, device="cpu") / count)


def cos_sin(
    geometry: Geometry,
    frequencies: Tensor,
    factor: float,
    dtype: torch.dtype,
    place: Callable[[Tensor], Tensor] = lambda positions: positions,
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of queries and of keys, times a factor.

    Args:
        geometry: the positions.
        frequencies: radians per position, ``[A, R / 2]`` or ``[H, A, R / 2]``; angles have their
            dtype.
        factor: factor of cosines and sines.
        dtype: dtype of the result.
        place: maps positions to the coordinates that frequencies are multiplied with.

    Returns:
        Cosines and sines of queries, ``[2, L, R / 2]``, ``[2, H, L, R / 2]`` or
        ``[2, B, 1 | H, L, R / 2]``; those of keys, with S for L.
    """

    def side(positions: Tensor, prefix: int) -> Tensor:
        placed = place(positions.to(frequencies.dtype))
        if placed.dim() == 3:
            placed = placed.unsqueeze(1)  # [B, 1, L, A]
        # A sum over axes, not a matrix product, which autocast would round.
        turned = placed.unsqueeze(-1) * frequencies.unsqueeze(-3)
        angles = nn.functional.pad(turned.sum(-2), (0, 0, prefix, 0))
        return (torch.stack((angles.cos(), angles.sin())) * factor).to(dtype)

    query, key = geometry.positions(frequencies.device)
    on_q = side(query, geometry.prefix)
    if key is query and geometry.key_prefix == geometry.prefix:
        return on_q, on_q
    return on_q, side(key, geometry.key_prefix)


def check_sizes(
    encoding: Encoding,
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    head_dim: int,
    heads: int | None = None,
) -> None:
    """Raise IrpeError if tensors or positions do not fit a rotary encoding."""
    spec = encoding.spec
    if not isinstance(geometry, Geometry):
        raise IrpeError(f"geometry={geometry!r} is not a geometry: make an irpe.Sequence or Grid")
    if geometry.axes not in spec.axes:
        other = "rope" if geometry.axes == 1 else "rope-axial or rope-mixed"
        raise IrpeError(
            f"{spec} needs positions of {' or '.join(map(str, spec.axes))} numbers, not of "
            f"{geometry.axes} as in {geometry!r}: use {other}"
        )
    geometry.check(q.shape[0], q.shape[2], k.shape[2])
    for name, x in (("q", q), ("k", k)):
        if x.shape[-1] != head_dim or heads not in (None, x.shape[1]):
            built = f"head_dim={head_dim}" if heads is None else f"{heads} heads of {head_dim}"
            raise IrpeError(f"{spec} was built for {built} channels, but {name} is {list(x.shape)}")


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Return x with pairs of channels rotated by angles (Su et al., Eq. 34).

    Args:
        x: ``[B, H, L, D]``; the first R channels are rotated, and rounded once.
        cos: ``[..., L, R / 2]``, broadcastable to x, float32 or float64.
        sin: likewise.
        layout: pairs are (2t, 2t + 1) in ``interleaved``, (t, t + R / 2) in ``half``.
    """
    learned = cos.requires_grad or sin.requires_grad
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if learned or traced or transformed:
        return _rotated(x, cos, sin, layout)
    return _Rotate.apply(x, cos, sin, layout, False)


def _pairs(x: Tensor, width: int, layout: str) -> tuple[Tensor, Tensor]:
    if layout == "half":
        return x[..., : width // 2], x[..., width // 2 : width]
    return x[..., 0:width:2], x[..., 1:width:2]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    width = 2 * cos.shape[-1]
    a, b = _pairs(x, width, layout)
    a, b = a.to(cos.dtype), b.to(cos.dtype)
    first, second = a * cos - b * sin, b * cos + a * sin
    if layout == "half":
        turned = torch.cat((first, second), -1)
    else:
        turned = torch.stack((first, second), -1).flatten(-2)
    turned = turned.to(x.dtype)
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), -1)


class _Rotate(torch.autograd.Function):
    """Saves only cosines and sines: the backward pass rotates the gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, layout: str, back: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.layout, ctx.back = layout, back
        width, sign = 2 * cos.shape[-1], (1.0 if back else -1.0)
        out = torch.empty_like(x)
        if width < x.shape[-1]:
            out[..., width:] = x[..., width:]
        a, b = _pairs(x, width, layout)
        first, second = _pairs(out, width, layout)
        if x.dtype == cos.dtype:
            torch.mul(a, cos, out=first).addcmul_(b, sin, value=sign)
            torch.mul(b, cos, out=second).addcmul_(a, sin, value=-sign)
        else:
            a, b = a.to(cos.dtype), b.to(cos.dtype)
            first.copy_((a * cos).addcmul_(b, sin, value=sign))
            second.copy_((b * cos).addcmul_(a, sin, value=-sign))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(grads[0], cos, sin, ctx.layout, not ctx.back), None, None, None, None
