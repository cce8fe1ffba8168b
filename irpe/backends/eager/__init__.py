"""Attention with terms in plain torch with an explicit backward pass: the fast backend on a CPU.

It computes the same as the reference, tile by tile and in place.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...terms import Term
from .. import reference
from ..call import Call, autocasting, without_autocast
from . import passes
from .rows import layout_of
from .workspace import Plan, Workspace

SMALL = 2**16  # B * H * L * S up to which the reference is faster
LEAST = 2**16  # L * S below which recomputing is never faster
MALLOC = 2**25  # bytes; malloc returns larger blocks to the system, and new ones must be zeroed


def unsupported(call: Call) -> str | None:
    """Return why the call is unsupported, or None."""
    if call.traced or call.compiled:
        return "its explicit backward pass cannot be traced or transformed"
    return "it computes no gradient of the mask" if call.mask_grad else None


def preference(call: Call) -> tuple[int, str]:
    """Return the rank of this backend for a call, and why."""
    if call.device.type == "cuda":
        return 20, "least memory of the backends that compute a value term"
    return 40, "fewest passes over the logits, measured fastest on a CPU"


def attention(call: Call) -> Tensor:
    """Return ``[B, H, L, E]``."""
    if autocasting(call.q.device.type):
        with without_autocast(call.q.device.type):
            return attention(call.cast())
    few = call.q.numel() * call.k.shape[2] <= SMALL * call.q.shape[3]
    if few and (call.q.itemsize >= 4 or not call.q.numel()):
        return reference.attention(call)
    k, v = call.grouped()
    kept = keeps(call)
    layout = None
    if not kept and call.q.device.type == "cpu":
        layout = layout_of([term.buckets.geometry for term in call.terms])
    seed = int(torch.empty((), dtype=torch.int64).random_(2**62)) if call.dropout_p else None
    none = call.q.new_empty(0)
    terms = [(term.kind, term.buckets) for term in call.terms]
    bare = replace(call, q=none, k=none, v=none, terms=())
    plan = Plan(bare, terms, layout, kept, torch.get_num_threads(), seed)
    out: Tensor = _Attention.apply(plan, call.q, k, v, *(t.table for t in call.terms))
    return out


def keeps(call: Call) -> bool:
    """Return whether probabilities are saved for the backward pass, not recomputed."""
    plain = type(call.q) in (Tensor, nn.Parameter) and call.q.device.type == "cpu"
    pairs = call.q.shape[-2] * call.k.shape[-2]
    return not plain or pairs < LEAST or pairs < least(call)


def least(call: Call) -> int:
    """Return L * S from which recomputing is faster, or as fast with less memory."""
    if call.kinds & {"slope", "gain", "channels"}:
        return 2**20
    layout = layout_of([term.buckets.geometry for term in call.terms])
    if layout is None:
        return 2**18
    if layout.query.line:
        return 2**19  # 512 tokens of T5 or Shaw: 20 % faster
    # Prefix tokens slow tiles down. Blocks up to MALLOC are cheaper to allocate.
    numbers = call.q.shape[:-1].numel() * call.k.shape[-2]
    return 2**20 if layout.prefix or 4 * numbers <= MALLOC else 2**18


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, *inputs: Tensor) -> Tensor:
        kept: list[Tensor] | None = [] if plan.kept and any(ctx.needs_input_grad) else None
        out, masses = passes.forward(Workspace(plan, inputs), kept)
        # Save the views q, k and v themselves: the caller keeps their memory anyway.
        ctx.save_for_backward(*inputs, *masses, *(kept or ()))
        ctx.plan, ctx.counts = plan, (len(inputs), len(inputs) + len(masses))
        return out.to(inputs[0].dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Read saved_tensors once: under activation checkpointing, it recomputes.
        saved, (first, second) = ctx.saved_tensors, ctx.counts
        inputs, recorded = saved[:first], torch.is_grad_enabled()
        # backward() may be called under autocast.
        with without_autocast(grads[0].device.type):
            with torch.no_grad():
                work = Workspace(ctx.plan, inputs)
                if not recorded:
                    for table, wanted in zip(work.tables, ctx.needs_input_grad[4:], strict=True):
                        table.requires_grad_(wanted)
                    found = passes.backward(work, grads[0], saved[first:second], saved[second:])
                    pairs = zip(found, inputs, strict=True)
                    return None, *(None if x is None else x.to(y.dtype) for x, y in pairs)
                keep = None if ctx.plan.seed is None else work.keep() * work.growth
            return _differentiable_backward(ctx.plan, grads[0], inputs, keep)


def _differentiable_backward(
    plan: Plan, grad: Tensor, inputs: Sequence[Tensor], keep: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return gradients computed by the reference, for double backward."""
    # One tensor may occur twice (q as k, a table in two terms): views separate its gradients.
    inputs = [x.view_as(x) for x in inputs]
    q, k, v, *tables = inputs
    given = zip(plan.terms, tables, strict=True)
    terms = tuple(Term(kind, table, buckets) for (kind, buckets), table in given)
    call = replace(plan.call, q=q, k=k, v=v, terms=terms, dropout_p=0.0)
    wanted = [x for x in inputs if x.requires_grad]
    out = reference.attention(call, None if keep is None else keep.to(q.dtype))
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True, allow_unused=True))
    return None, *(next(found) if x.requires_grad else None for x in inputs)
