"""The operators ``irpe::fused_attention`` and its backward: schema, shapes and gradients.

Few arguments, since each one costs time in every call: tensors in lists, and a code of integers
from which the operators find a plan, see plan.py. They are registered without a wrapper of their
own, and ``FusedAttention`` gives them a gradient. Triton itself is imported by the first launch.

    tables: of the terms, as they are kept: of any floating-point dtype
    given: the mask ``[B, H, L, S]`` (uint8, not 0: visible; or added to the logits), the seed of
        the dropout (int64 ``[1]``), maps of ids and their transpose where the code has none
    code: ``Code.pack``
    floats: dropout_p and scale
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import IrpeError
from ..call import autocasting
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
    """Return empty outputs: out and stats; of rows, columns and mass, those that exist; and tables.

    Returns:
        out ``[B, H, L, E]``; stats ``[2, H, B, L]``, the largest logit and the logarithm of the sum
        to base 2; numbers added to the logits, of queries ``[H, B, L, W]`` (``[H | 1, W]`` for all
        queries) and of keys ``[H, B, S, W]``; the probability in each bucket after the dropout
        ``[H, B, L, W]``; and what ``Plan.combine`` returns for query, key and value tables, with
        H | 1 heads.
    """
    found = Code.unpack(code)
    kinds = [KINDS[term.kind] for term in found.terms]
    wide = found.maps * found.width
    made = empty_outputs(q, k, v, tables, kinds, wide, bool(found.on_grid))
    for kind in sorted({*kinds} - {"bias"}, key=KINDS.index):
        own = [table for table, of in zip(tables, kinds, strict=True) if of == kind]
        shape = [max(table.shape[0] for table in own), *own[0].shape[1:]]
        shape[1 if kind == "value" else 2] = wide
        made.append(q.new_empty(shape))
    return made


def empty_outputs(
    q: Tensor, k: Tensor, v: Tensor, tables: Sequence[Tensor], kinds: Sequence[str], wide: int,
    on_grid: bool,
) -> list[Tensor]:  # fmt: skip
    """Return the outputs but for the tables, for W numbers in a row."""
    B, H, L, _ = q.shape
    made = [empty_like((B, H, L, v.shape[-1]), q), q.new_empty((2, H, B, L), dtype=torch.float32)]
    # On strips they enter a product, whose other side has this dtype.
    kind = torch.float32 if "bias" in kinds and not on_grid else q.dtype
    if "query" in kinds:
        made.append(q.new_empty((H, B, L, wide), dtype=kind))
    elif "bias" in kinds:
        heads = max(t.shape[0] for t in tables)
        made.append(q.new_empty((heads, wide), dtype=kind))
    if "key" in kinds:
        made.append(q.new_empty((H, B, k.shape[2], wide)))
    if "value" in kinds:
        made.append(q.new_empty((H, B, L, wide)))
    return made


@torch.library.register_fake("irpe::fused_attention_backward", lib=LIBRARY)
def _(
    grad: Tensor, qkv: Sequence[Tensor], tables: Sequence[Tensor], given: Any, saved: Any,
    code: Any, floats: Any, wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    grads = [empty_like(x.shape, x) for x in qkv]
    return grads + [x.new_empty(x.shape) for x, want in zip(tables, wanted, strict=True) if want]


def empty_like(shape: Sequence[int], x: Tensor) -> Tensor:
    """Return an empty ``[B, H, R, D]``, a view of ``[B, R, H, D]`` as projections have it."""
    B, H, R, D = shape
    return x.new_empty((B, R, H, D)).transpose(1, 2)


class FusedAttention(torch.autograd.Function):
    """Attention with terms, and its gradients with respect to q, k, v and the tables."""

    @staticmethod
    def forward(ctx: Any, code: list[int], floats: list[float], *tensors: Tensor | None) -> Tensor:
        given, (q, k, v), tables = tensors[:4], tensors[4:7], tensors[7:]
        saved = fused_attention(q, k, v, list(tables), list(given), code, floats)
        ctx.code, ctx.floats = code, floats
        ctx.save_for_backward(*tensors, *saved)
        return saved[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors, wanted = ctx.saved_tensors, list(ctx.needs_input_grad[9:])
        last = 7 + len(wanted)
        given, qkv, tables = tensors[:4], tensors[4:7], tensors[7:last]
        grads = fused_attention_backward(
            grad, list(qkv), list(tables), list(given), list(tensors[last:]),
            ctx.code, ctx.floats, wanted,
        )  # fmt: skip
        if torch.is_grad_enabled():
            grads = NoSecond.apply(grad, *grads)
        left = iter(grads[3:])
        return (
            None, None, None, None, None, None,
            *grads[:3], *(next(left) if want else None for want in wanted),
        )  # fmt: skip


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
