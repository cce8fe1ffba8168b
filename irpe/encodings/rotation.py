"""Rotation of pairs of channels: the arithmetic of rotary embeddings, written out both ways.

Tables are float32 or better, whatever is rotated; the result is rounded once.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Turn pairs of channels of x by the angles of a table (Su et al., Eq. 34).

    Args:
        x: ``[B, H, L, D]``.
        cos, sin: ``[..., L, R / 2]``, broadcastable to x's first axes, in float32 or float64; the
            first R channels are rotated, the others pass.
        layout: pairs are (2t, 2t + 1) in ``interleaved``, (t, t + R / 2) in ``half``.

    Returns:
        As x.
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
    """Keeps the table and nothing else: the gradient is rotated back."""

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
