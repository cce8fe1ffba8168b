"""The operators ``irpe::fused_attention`` and its backward: schema, shapes and gradients.

Few arguments, since each one costs time in every call: tensors in lists, and a code of integers
from which the operators find a plan, see plan.py. They are registered without a wrapper of their
own, and ``FusedAttention`` gives them a gradient. Triton itself is imported by the first launch.

    tables: of the terms, as they are kept: of any floating-point dtype
    given: the mask ``[B, H, L, S]`` (uint8, not 0: visible; or added to the logits), the seed of
        the dropout (int64 ``[1]``), maps of ids where the code has none
    code: ``Code.pack``
    floats: dropout_p and scale
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import IrpeError
from ..call import autocasting
from .outputs import empty_flat, empty_like, empty_outputs
from .plan import KINDS, Code

LIBRARY = torch.library.Library("irpe", "FRAGMENT")
LIBRARY.define(
    "fused_attention(Tensor q, Tensor k, Tensor v, Tensor[] tables, Tensor?[] given, "
    "SymInt[] code, float[] floats) -> Tensor[]"
)
LIBRARY.define(
    "fused_attention_backward(Tensor grad, Tensor[] qkv, Tensor[] tables, Tensor?[] given, "
    "Tensor[] saved, SymInt[] code, float[] floats, bool[] wanted) -> Tensor[]"
)
fused_attention = torch.ops.irpe.fused_attention.default
fused_attention_backward = torch.ops.irpe.fused_attention_backward.default


def _forward(q: Tensor, *others: Any) -> list[Tensor]:
    from . import passes

    return _undisturbed(passes.forward, q, *others)


def _backward(grad: Tensor, *others: Any) -> list[Tensor]:
    from . import passes

    return _undisturbed(passes.backward, grad, *others)


def _undisturbed(run: Callable[..., list[Tensor]], x: Tensor, *others: Any) -> list[Tensor]:
    """Run on the device of x, without autocast: dtypes are chosen here."""
    kind = x.device.type
    casting = autocasting(kind)
    if casting:
        torch.set_autocast_enabled(kind, False)
    try:
        if kind == "cuda" and x.device.index != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return run(x, *others)
        return run(x, *others)
    finally:
        if casting:
            torch.set_autocast_enabled(kind, True)


for _device in ("CPU", "CUDA"):  # on a CPU they run in Triton's interpreter
    LIBRARY.impl("fused_attention", _forward, _device)
    LIBRARY.impl("fused_attention_backward", _backward, _device)


@torch.library.register_fake("irpe::fused_attention", lib=LIBRARY)
def outputs(
    q: Tensor, k: Tensor, v: Tensor, tables: Sequence[Tensor], given: Sequence[Tensor | None],
    code: Sequence[int], floats: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    """Return empty outputs: out and stats, and those that exist of the others.

    Returns:
        out ``[B, H, L, E]``; stats ``[2, H, B, L]``, the largest logit and the logarithm of the sum
        to base 2; sums of the tables of query, key and value terms in the order of W,
        ``[kinds, H, W, STEP]``, and of the biases, ``[H, W]``; numbers added to the logits, of
        queries ``[H, B, L, W]`` (without query terms these are the biases) and of keys
        ``[H, B, S, W]``.
    """
    found = Code.unpack(code)
    kinds = [KINDS[term.kind] for term in found.terms]
    return empty_outputs(q, k, v, kinds, found.maps * found.width, bool(found.on_grid))


@torch.library.register_fake("irpe::fused_attention_backward", lib=LIBRARY)
def _(
    grad: Tensor, qkv: Sequence[Tensor], tables: Sequence[Tensor], given: Any, saved: Any,
    code: Any, floats: Any, wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    return [*(empty_like(x.shape, x) for x in qkv), empty_flat(tables, wanted, grad)]


class FusedAttention(torch.autograd.Function):
    """Attention with terms, and its gradients with respect to q, k, v and the tables."""

    @staticmethod
    def forward(ctx: Any, code: list[int], floats: list[float], *tensors: Tensor | None) -> Tensor:
        given, (q, k, v), tables = tensors[:3], tensors[3:6], tensors[6:]
        saved = fused_attention(q, k, v, list(tables), list(given), code, floats)
        ctx.code, ctx.floats = code, floats
        ctx.save_for_backward(*tensors, *saved)
        return saved[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors, wanted = ctx.saved_tensors, list(ctx.needs_input_grad[8:])
        last = 6 + len(wanted)
        given, qkv, tables = tensors[:3], tensors[3:6], tensors[6:last]
        grads = fused_attention_backward(
            grad, list(qkv), list(tables), list(given), list(tensors[last:]),
            ctx.code, ctx.floats, wanted,
        )  # fmt: skip
        if torch.is_grad_enabled():
            grads = NoSecond.apply(grad, *grads)
        flat, of_tables, at = grads[3], [], 0
        for table, want in zip(tables, wanted, strict=True):
            own = flat.narrow(0, at, table.numel()).view(table.shape) if want else None
            of_tables.append(None if own is None else own.to(table.dtype))
            at += table.numel()
        return (None, None, None, None, None, *grads[:3], *of_tables)


class NoSecond(torch.autograd.Function):
    """Raise at a second derivative."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, ...]:
        raise IrpeError(
            "the triton backend has no second derivative: pass backend='reference' for a backward "
            "pass that is differentiated itself (create_graph=True, gradient penalties, Hessians)"
        )
