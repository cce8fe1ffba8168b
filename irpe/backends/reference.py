"""Attention with terms in plain torch, for any dtype and device, differentiable to any order.

This backend is the specification; all others are tested against it.
"""

import torch.nn.functional as F
from torch import Tensor

from ..terms import Term
from .call import Call, added, expanded, project


def lookup(x: Tensor, ids: Tensor) -> Tensor:
    """Return y with ``y[b, h, i, j] = x[b, h, i, ids[(b,) i, j]]``."""
    ids = ids.unsqueeze(1) if ids.dim() == 3 else ids
    return x.gather(-1, ids.expand(*x.shape[:-1], ids.shape[-1]))


def unsupported(call: Call) -> str | None:
    """Return None: the reference supports every call."""
    return None


def preference(call: Call) -> tuple[int, str]:
    """Return the rank of this backend for a call, and why."""
    if call.traced or (call.compiled and call.device.type != "cuda"):
        return 90, "plain operations, which compilers fuse and exporters support"
    return 0, "plain torch, supports every call"


def attention(call: Call, keep: Tensor | None = None) -> Tensor:
    """Return ``[B, H, L, E]``.

    Args:
        call: the call.
        keep: a dropout mask to use instead of drawing one, with values 0 and 1 / (1 - p).
    """
    k, v = call.grouped()
    scores, dead = logits(call, k)
    probabilities = scores.softmax(-1)
    if dead is not None:
        probabilities = probabilities.masked_fill(dead, 0.0)
    if keep is not None:
        probabilities = probabilities * keep
    elif call.dropout_p > 0.0:
        probabilities = F.dropout(probabilities, call.dropout_p)
    return weighted(probabilities, v, call.terms)


def logits(call: Call, k: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the masked logits ``[B, H, L, S]``, and the rows without visible keys.

    These rows are not masked, see ``Call.merged_mask``.

    Args:
        call: the call.
        k: its keys, with as many heads as q.
    """
    q = call.q * call.scale
    total = _content(q, k, call.terms)
    for term in call.terms:
        if term.kind == "gain":
            total = total * expanded(term.table, term.buckets.dense(q.device))
    for term in call.terms:
        part = position(term, q, k, call.scale)
        if part is not None:
            total = total + part
    mask, dead = call.merged_mask()
    if mask is not None:
        additive = mask.is_floating_point()
        total = total + mask if additive else total.masked_fill(~mask, float("-inf"))
    return total, dead


def weighted(probabilities: Tensor, v: Tensor, terms: tuple[Term, ...]) -> Tensor:
    """Return probabilities ``[B, H, L, S]`` times the values, plus the value terms."""
    out = probabilities @ v
    for term in terms:
        if term.kind == "value":
            ids = term.buckets.dense(v.device)
            ids = ids.unsqueeze(1) if ids.dim() == 3 else ids
            mass = probabilities.new_zeros(*probabilities.shape[:-1], term.buckets.size)
            mass = mass.scatter_add(-1, ids.expand_as(probabilities), probabilities)
            out = out + project(mass, term.table)
    return out


def position(term: Term, q: Tensor, k: Tensor, scale: float) -> Tensor | None:
    """Return the values that a term adds to the logits, ``[1 | B, H | 1, L, S]``.

    Args:
        term: the term.
        q: ``[B, H, L, D]``, scaled.
        k: ``[B, H, S, D]``, not scaled.
        scale: factor of the dot products.

    Returns:
        None for terms that are not added to the logits.
    """
    match term.kind:
        case "bias" | "slope":
            return added(term, q)
        case "query":
            return lookup(project(q, term.table), term.buckets.dense(q.device))
        case "key":
            ids = term.buckets.dense(q.device)
            rows = project(k * scale, term.table)
            return lookup(rows, ids.transpose(-2, -1)).transpose(-2, -1)
    return None


def _content(q: Tensor, k: Tensor, terms: tuple[Term, ...]) -> Tensor:
    """Return q k^T ``[B, H, L, S]``, with each channel scaled by the channel terms."""
    factors = None
    for term in terms:
        if term.kind == "channels":
            ids = term.buckets.dense(q.device)
            factor = term.table[..., ids]  # [H | 1, D, (B,) L, S]
            factor = factor.movedim(2, 0) if ids.dim() == 3 else factor.unsqueeze(0)
            factors = factor if factors is None else factors * factor
    if factors is None:
        return q @ k.transpose(-2, -1)
    channels = q.transpose(-2, -1).unsqueeze(-1) * k.transpose(-2, -1).unsqueeze(-2)
    return (channels * factors).sum(2)  # of [B, H, D, L, S]
