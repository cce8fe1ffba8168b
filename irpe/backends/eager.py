"""Attention with terms in plain torch, with a backward written out: the fast path of a CPU.

Same maths as the reference. It differs in what it keeps (the probabilities, and nothing else of
size ``[B, H, L, S]``) and in that every pass over such a tensor works in place. Gathers and
scatters run over rows laid end to end, so a table that meets the key costs what one that meets
the query does: nothing is transposed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..buckets import BucketIds
from ..terms import Kind, Term
from . import reference
from .call import Call, added, autocasting


def unsupported(kinds: frozenset[str]) -> str | None:
    """Why these kinds of terms cannot be computed, None if they can."""
    refused = kinds & {"gain", "channels"}
    return f"{' and '.join(sorted(refused))} terms have no backward here" if refused else None


def attention(call: Call) -> Tensor:
    """``[B, H, L, D]``."""
    k, v = call.grouped()
    plan = [(term.kind, term.buckets) for term in call.terms]
    return _Attention.apply(call, plan, call.q, k, v, *(t.table for t in call.terms))


Plan = Sequence[tuple[Kind, BucketIds]]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Call, plan: Plan, q: Tensor, k: Tensor, v: Tensor, *tables: Tensor
    ) -> Tensor:
        (B, H, L, D), S = q.shape, k.shape[-2]
        scaled = torch.mul(q, call.scale, out=q.new_empty(q.shape))  # contiguous, in one pass
        keys, values = k.contiguous(), v.contiguous()
        logits = scaled.view(B * H, L, D) @ keys.view(B * H, S, D).transpose(1, 2)
        logits = logits.view(B, H, L, S)
        for (kind, buckets), table in zip(plan, tables, strict=True):
            if kind in ("bias", "slope"):
                logits += added(Term(kind, table, buckets), q)
            elif kind == "query":
                _add_rows(logits, _times(scaled, table), buckets)
            elif kind == "key":
                _add_rows(logits, _times(keys, table * call.scale), buckets)
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
                mass = _sum_rows(dropped, buckets, L).view(B, H, L, buckets.size)
                out += _times(mass, table)
                masses.append(mass)
        # What the backward pass needs and the caller holds anyway is not copied: q, k and v
        # stay the views they are, and are laid out again when the time comes.
        ctx.save_for_backward(q, k, v, kept, keep, *tables, *masses)
        none = q.new_empty(0)
        ctx.call = Call(none, none, none, (), call.mask, call.is_causal, call.dropout_p, call.scale)
        ctx.plan = plan
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # backward() may be called inside of autocast; this one chooses its own precision.
        device = grads[0].device.type
        if autocasting(device):
            with torch.autocast(device, enabled=False):
                return _Attention.backward(ctx, *grads)
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, *grads)
        (grad,) = grads
        plan, scale, p = ctx.plan, ctx.call.scale, ctx.call.dropout_p
        q, k, v, kept, keep, *rest = ctx.saved_tensors
        tables, masses = rest[: len(plan)], iter(rest[len(plan) :])
        (B, H, L, D), S = q.shape, k.shape[-2]
        grad, queries, keys = grad.contiguous(), q.contiguous(), k.contiguous()
        grad3, values = grad.view(B * H, L, v.shape[-1]), v.contiguous().view(B * H, S, v.shape[-1])
        table_grads: list[Tensor | None] = [None] * len(plan)

        dropped = kept if keep is None else _drop(kept, keep, p)
        grad_v = (dropped.view(B * H, L, S).transpose(1, 2) @ grad3).view(v.shape)
        del dropped
        flow = (grad3 @ values.transpose(1, 2)).view(B, H, L, S)  # gradient of the probabilities
        for i, (kind, buckets) in enumerate(plan):
            if kind == "value":
                _add_rows(flow, _times(grad, tables[i].transpose(1, 2)), buckets)
                table_grads[i] = _outer(next(masses), grad, tables[i])
        if keep is not None:
            flow = _drop(flow, keep, p, out=flow)
        flow = torch.ops.aten._softmax_backward_data.out(
            flow, kept, -1, kept.dtype, grad_input=flow
        )  # of the logits

        flow3 = flow.view(B * H, L, S)
        grad_q = (flow3 @ keys.view(B * H, S, D)).view(q.shape)
        grad_k = (flow3.transpose(1, 2) @ queries.view(B * H, L, D)).view(k.shape)
        for i, (kind, buckets) in enumerate(plan):
            if kind == "bias":
                table_grads[i] = _bias_grad(flow, buckets.dense(q.device), tables[i])
            elif kind == "slope":
                if ctx.needs_input_grad[5 + i]:  # ALiBi's never does
                    table_grads[i] = _slope_grad(flow, buckets, tables[i])
            elif kind in ("query", "key"):
                own, content, length = (
                    (grad_q, queries, L) if kind == "query" else (grad_k, keys, S)
                )
                rows = _sum_rows(flow, buckets, length).view(B, H, length, buckets.size)
                _add_times(own, rows, tables[i].transpose(1, 2))
                table_grads[i] = _outer(content, rows, tables[i]).mul_(scale)
        return None, None, grad_q.mul_(scale), grad_k.mul_(scale), grad_v, *table_grads


def _differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients by way of the reference, for a backward pass that is itself differentiated."""
    q, k, v, _, keep, *rest = ctx.saved_tensors
    # One tensor may be given twice (q as k, a table in two terms): views tell its uses apart.
    inputs = [x.view_as(x) for x in (q, k, v, *rest[: len(ctx.plan)])]
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


def _times(x: Tensor, table: Tensor) -> Tensor:
    """``[B, H, R, D] @ [H | 1, D, N]`` of contiguous x, one product for a shared table."""
    if table.shape[0] == 1:
        return (x.flatten(0, -2) @ table[0]).view(*x.shape[:-1], table.shape[-1])
    return x @ table


def _add_times(out: Tensor, x: Tensor, table: Tensor) -> None:
    """``out += x @ table``."""
    if table.shape[0] == 1:
        out.flatten(0, -2).addmm_(x.flatten(0, -2), table[0])
    else:
        out += x @ table


def _outer(x: Tensor, y: Tensor, table: Tensor) -> Tensor:
    """Gradient of a table that took x ``[B, H, R, D]`` to y ``[B, H, R, N]``: its shape."""
    if table.shape[0] == 1:
        return (x.flatten(0, -2).t() @ y.flatten(0, -2)).unsqueeze(0)
    return (x.transpose(-2, -1) @ y).sum(0)


def _add_rows(out: Tensor, rows: Tensor, buckets: BucketIds) -> None:
    """``out[b, h, i, j] += rows[b, h, owner, n(i, j)]``, rows ``[B, H, R, N]``."""
    B, H = out.shape[:2]
    index = buckets.flat(out.device).expand(B, H, -1)
    out.flatten(2).add_(rows.flatten(2).gather(-1, index))


def _sum_rows(x: Tensor, buckets: BucketIds, length: int) -> Tensor:
    """``[B, H, length * N]``: x ``[B, H, L, S]`` summed over the pairs of each owner and bucket."""
    B, H = x.shape[:2]
    index = buckets.flat(x.device).expand(B, H, -1)
    # Sums of hundreds of numbers are kept in float32, whatever x is.
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = torch.zeros(B, H, length * buckets.size, dtype=wide, device=x.device)
    return sums.scatter_add_(-1, index, x.flatten(2).to(wide)).to(x.dtype)


def _bias_grad(flow: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    if table.shape[0] == 1:
        flow = flow.sum(1, keepdim=True)
    if ids.dim() == 2:
        flow, ids = flow.sum(0, keepdim=True), ids.unsqueeze(0)
    flow = flow.flatten(2)
    wide = torch.promote_types(flow.dtype, torch.float32)
    sums = torch.zeros(*flow.shape[:2], table.shape[-1], dtype=wide, device=flow.device)
    index = ids.flatten(1).unsqueeze(1).expand_as(flow)
    return sums.scatter_add_(-1, index, flow.to(wide)).sum(0).to(table.dtype)


def _slope_grad(flow: Tensor, buckets: BucketIds, table: Tensor) -> Tensor:
    wide = torch.promote_types(flow.dtype, torch.float32)
    far = buckets.distances(flow.device, wide)
    far = far.unsqueeze(1) if far.dim() == 3 else far
    sums = (flow.to(wide) * far).sum((0, 2, 3)).unsqueeze(-1)
    return (sums.sum(0, keepdim=True) if table.shape[0] == 1 else sums).to(table.dtype)


def _drop(x: Tensor, keep: Tensor, p: float, out: Tensor | None = None) -> Tensor:
    dropped = torch.mul(x, keep, out=out) if out is not None else x * keep
    return dropped.mul_(1.0 / (1.0 - p)) if p < 1.0 else dropped
