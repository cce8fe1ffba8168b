"""Attention with terms in plain torch, with a backward written out: the fast path of a CPU.

Same maths as the reference. It differs in what it keeps (the probabilities, and nothing else of
size ``[B, H, L, S]``) and in that every pass over such a tensor works in place. Gathers and
scatters run over rows laid end to end, so a table that meets the key costs what one that meets
the query does: nothing is transposed.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...buckets import BucketIds
from ...terms import Kind, Term
from .. import reference
from ..call import Call, added, autocasting, expanded
from . import tiled
from .content import Multipliers, content_grads, content_logits, gain_grads
from .rows import add_rows, add_times, bias_grad, outer, slope_grad, sum_rows, times

BLOCK = 128  # queries, at least, that go together where attention is causal


def attention(call: Call) -> Tensor:
    """``[B, H, L, D]``."""
    k, v = call.grouped()
    early = k.shape[-2] - call.q.shape[-2]
    tiles = tiled.serves(call)
    if tiles or not call.is_causal or early < 0 or call.q.shape[-2] < 2 * BLOCK:
        return _whole(_Tiled if tiles else _Attention, call, k, v)
    # Later keys are hidden anyway: queries go in blocks, each with the keys that its last one sees.
    length = call.q.shape[-2]
    step = max(BLOCK, -(-length // 8))
    parts = []
    for start in range(0, length, step):
        stop = min(start + step, length)
        keys = early + stop
        terms = tuple(
            Term(t.kind, t.table, replace(t.buckets, block=(start, stop, keys))) for t in call.terms
        )
        mask = call.mask
        if mask is not None:
            mask = mask[..., start:stop, :] if mask.dim() > 1 and mask.shape[-2] > 1 else mask
            mask = mask[..., :keys] if mask.shape[-1] > 1 else mask
        own, seen = call.q[:, :, start:stop], (k[:, :, :keys], v[:, :, :keys])
        part = Call(own, *seen, terms, mask, True, call.dropout_p, call.scale)
        parts.append(_whole(_Attention, part, *seen))
    return torch.cat(parts, 2)


def _whole(function: Any, call: Call, k: Tensor, v: Tensor) -> Tensor:
    plan = [(term.kind, term.buckets) for term in call.terms]
    return function.apply(call, plan, call.q, k, v, *(t.table for t in call.terms))


Plan = Sequence[tuple[Kind, BucketIds]]


def _of(plan: Plan, tables: Sequence[Tensor], wanted: Kind) -> Multipliers:
    terms = zip(plan, tables, strict=True)
    return [(buckets, table) for (kind, buckets), table in terms if kind == wanted]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Call, plan: Plan, q: Tensor, k: Tensor, v: Tensor, *tables: Tensor
    ) -> Tensor:
        (B, H, L, _), S = q.shape, k.shape[-2]
        channels, gains = _of(plan, tables, "channels"), _of(plan, tables, "gain")
        scaled = torch.mul(q, call.scale, out=q.new_empty(q.shape))  # contiguous, in one pass
        keys, values = k.contiguous(), v.contiguous()
        logits = content_logits(scaled, keys, channels)
        for buckets, table in gains:
            logits *= expanded(table, buckets.dense(q.device))
        for (kind, buckets), table in zip(plan, tables, strict=True):
            if kind in ("bias", "slope"):
                logits += added(Term(kind, table, buckets), q)
            elif kind == "query":
                add_rows(logits, times(scaled, table), buckets)
            elif kind == "key":
                add_rows(logits, times(keys, table * call.scale), buckets)
        mask, dead = call.merged_mask()
        if mask is not None:
            if mask.is_floating_point():
                logits += mask
            else:
                logits.masked_fill_(~mask, float("-inf"))
        kept = torch.softmax(logits, -1, out=logits)
        if dead is not None:
            kept.masked_fill_(dead, 0.0)
        keep = None
        dropped = kept
        if call.dropout_p > 0.0:
            keep = torch.empty_like(kept, dtype=torch.bool).bernoulli_(1.0 - call.dropout_p)
            dropped = _drop(kept, keep, call.dropout_p)
        out = dropped.view(B * H, L, S) @ values.view(B * H, S, v.shape[-1])
        out = out.view(B, H, L, v.shape[-1])
        masses = []
        for (kind, buckets), table in zip(plan, tables, strict=True):
            if kind == "value":
                mass = sum_rows(dropped, buckets, L).view(B, H, L, buckets.size)
                out += times(mass, table)
                masses.append(mass)
        # What the backward pass needs and the caller holds anyway is not copied: q, k and v
        # stay the views they are, and are laid out again when the time comes.
        ctx.save_for_backward(q, k, v, kept, keep, *tables, *masses)
        ctx.call, ctx.plan = _without_tensors(call), plan
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # backward() may be called inside of autocast; this one chooses its own precision.
        device = grads[0].device.type
        if autocasting(device):
            with torch.autocast(device, enabled=False):
                return _Attention.backward(ctx, *grads)
        if torch.is_grad_enabled():
            q, k, v, _, keep, *rest = ctx.saved_tensors
            return _differentiable_backward(ctx, grads[0], [q, k, v, *rest[: len(ctx.plan)]], keep)
        (grad,) = grads
        plan, scale, p = ctx.plan, ctx.call.scale, ctx.call.dropout_p
        q, k, v, kept, keep, *rest = ctx.saved_tensors
        tables, masses = rest[: len(plan)], iter(rest[len(plan) :])
        (B, H, L, _), S = q.shape, k.shape[-2]
        grad, queries, keys = grad.contiguous(), q.contiguous(), k.contiguous()
        grad3, values = grad.view(B * H, L, v.shape[-1]), v.contiguous().view(B * H, S, v.shape[-1])
        table_grads: list[Tensor | None] = [None] * len(plan)

        dropped = kept if keep is None else _drop(kept, keep, p)
        grad_v = (dropped.view(B * H, L, S).transpose(1, 2) @ grad3).view(v.shape)
        del dropped
        flow = (grad3 @ values.transpose(1, 2)).view(B, H, L, S)  # gradient of the probabilities
        for i, (kind, buckets) in enumerate(plan):
            if kind == "value":
                add_rows(flow, times(grad, tables[i].transpose(1, 2)), buckets)
                table_grads[i] = outer(next(masses), grad, tables[i])
        if keep is not None:
            flow = _drop(flow, keep, p, out=flow)
        flow = torch.ops.aten._softmax_backward_data.out(
            flow, kept, -1, kept.dtype, grad_input=flow
        )  # of the logits

        channels, gains = _of(plan, tables, "channels"), _of(plan, tables, "gain")
        through = flow
        gain_parts: list[Tensor] = []
        if gains:
            through, gain_parts = gain_grads(flow, queries * scale, keys, channels, gains)
        grad_q, grad_k, channel_parts = content_grads(through, queries, keys, channels)
        multiplied = {"gain": iter(gain_parts), "channels": iter(channel_parts)}
        for i, (kind, buckets) in enumerate(plan):
            if kind == "bias":
                table_grads[i] = bias_grad(flow, buckets.dense(q.device), tables[i])
            elif kind == "slope":
                if ctx.needs_input_grad[5 + i]:  # ALiBi's never does
                    table_grads[i] = slope_grad(flow, buckets, tables[i])
            elif kind == "gain":
                table_grads[i] = next(multiplied[kind])
            elif kind == "channels":
                table_grads[i] = next(multiplied[kind]).mul_(scale)
            elif kind in ("query", "key"):
                own, x, length = (grad_q, queries, L) if kind == "query" else (grad_k, keys, S)
                rows = sum_rows(flow, buckets, length).view(B, H, length, buckets.size)
                add_times(own, rows, tables[i].transpose(1, 2))
                table_grads[i] = outer(x, rows, tables[i]).mul_(scale)
        return None, None, grad_q.mul_(scale), grad_k.mul_(scale), grad_v, *table_grads


class _Tiled(torch.autograd.Function):
    """The same in tiles, which the backward pass makes again."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, plan: Plan, q: Tensor, k: Tensor, v: Tensor, *tables: Tensor
    ) -> Tensor:
        ctx.threads, ctx.seed = torch.get_num_threads(), None
        if call.dropout_p > 0.0:
            ctx.seed = int(torch.empty((), dtype=torch.int64, device=q.device).random_(2**62))
        work = tiled.Pass(call, plan, (q, k, v), tables, ctx.threads, ctx.seed)
        out, masses = work.forward()
        ctx.save_for_backward(q, k, v, *tables, *masses)
        ctx.call, ctx.plan = _without_tensors(call), plan
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        device = grads[0].device.type
        if autocasting(device):
            with torch.autocast(device, enabled=False):
                return _Tiled.backward(ctx, *grads)
        (grad,), count = grads, 3 + len(ctx.plan)
        inputs, masses = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        recorded = torch.is_grad_enabled()
        with torch.no_grad():
            work = tiled.Pass(ctx.call, ctx.plan, inputs[:3], inputs[3:], ctx.threads, ctx.seed)
            if not recorded:
                found = zip(work.backward(grad, masses), inputs, strict=True)
                return None, None, *(None if x is None else x.to(y.dtype) for x, y in found)
            keep = None if ctx.seed is None else work.keep()
        return _differentiable_backward(ctx, grad, inputs, keep)


def _without_tensors(call: Call) -> Call:
    none = call.q.new_empty(0)
    return replace(call, q=none, k=none, v=none, terms=())


def _differentiable_backward(
    ctx: Any, grad: Tensor, inputs: Sequence[Tensor], keep: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients by way of the reference, for a backward pass that is itself differentiated."""
    # One tensor may be given twice (q as k, a table in two terms): views tell its uses apart.
    inputs = [x.view_as(x) for x in inputs]
    q, k, v, *tables = inputs
    base: Call = ctx.call
    terms = tuple(
        Term(kind, table, buckets) for (kind, buckets), table in zip(ctx.plan, tables, strict=True)
    )
    call = Call(q, k, v, terms, base.mask, base.is_causal, 0.0, base.scale)
    drawn = (
        None if keep is None else _drop(torch.ones_like(keep, dtype=q.dtype), keep, base.dropout_p)
    )
    wanted = [x for x in inputs if x.requires_grad]
    out = reference.attention(call, drawn)
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True, allow_unused=True))
    return None, None, *(next(found) if x.requires_grad else None for x in inputs)


def _drop(x: Tensor, keep: Tensor, p: float, out: Tensor | None = None) -> Tensor:
    dropped = torch.mul(x, keep, out=out) if out is not None else x * keep
    return dropped.mul_(1.0 / (1.0 - p)) if p < 1.0 else dropped
