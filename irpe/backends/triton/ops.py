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


def empty_outputs(
    q: Tensor, k: Tensor, v: Tensor, kinds: Sequence[str], wide: int, on_grid: bool
) -> list[Tensor]:
    """Return the outputs for W numbers in a row."""
    (B, H, L, D), (S, E) = q.shape, v.shape[2:]
    made = [empty_like((B, H, L, E), q), q.new_empty((2, H, B, L), dtype=torch.float32)]
    # On strips they enter a product, whose other side has this dtype.
    kind = torch.float32 if "bias" in kinds and not on_grid else q.dtype
    vectors = {*kinds} - {"bias"}
    if vectors:
        made.append(q.new_empty((len(vectors), H, wide, max(padded(D), padded(E)))))
    if "bias" in kinds:
        made.append(q.new_empty((H, wide), dtype=kind))
    if "query" in kinds:
        made.append(q.new_empty((H, B, L, wide), dtype=kind))
    if "key" in kinds:
        made.append(q.new_empty((H, B, S, wide)))
    return made


def padded(width: int) -> int:
    """Return the channels of a head in a tile."""
    return max(16, 1 << (width - 1).bit_length())


def empty_flat(tables: Sequence[Tensor], wanted: Sequence[bool], q: Tensor) -> Tensor:
    """Return an empty tensor for the gradients of all tables, one after another."""
    dtypes = {t.dtype for t in tables}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return q.new_empty(sum(t.numel() for t in tables) if any(wanted) else 0, dtype=dtype)


@torch.library.register_fake("irpe::fused_attention_backward", lib=LIBRARY)
def _(
    grad: Tensor, qkv: Sequence[Tensor], tables: Sequence[Tensor], given: Any, saved: Any,
    code: Any, floats: Any, wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    return [*(empty_like(x.shape, x) for x in qkv), empty_flat(tables, wanted, grad)]


def empty_like(shape: Sequence[int], x: Tensor) -> Tensor:
    """Return an empty ``[B, H, R, D]``, a view of ``[B, R, H, D]`` as projections have it."""
    B, H, R, D = shape
    return x.new_empty((B, R, H, D)).transpose(1, 2)


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
