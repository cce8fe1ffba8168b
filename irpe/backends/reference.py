"""Attention with terms in plain torch: any dtype, any device, differentiable to any order.

This is the specification; every other backend is tested against it.
"""

import torch.nn.functional as F
from torch import Tensor

from .call import Call, expanded, meet


def lookup(x: Tensor, ids: Tensor) -> Tensor:
    """``y[b, h, i, j] = x[b, h, i, ids[(b,) i, j]]``."""
    ids = ids.unsqueeze(1) if ids.dim() == 3 else ids
    return x.gather(-1, ids.expand(*x.shape[:-1], ids.shape[-1]))


def attention(call: Call, keep: Tensor | None = None) -> Tensor:
    """``[B, H, L, D]``. ``keep`` replaces the dropout by one drawn before: zero or 1 / (1 - p)."""
    k, v = call.grouped()
    q = call.q * call.scale
    logits = q @ k.transpose(-2, -1)
    for term in call.terms:
        if term.kind == "gain":
            logits = logits * expanded(term.table, term.buckets.dense(q.device))
    for term in call.terms:
        ids = term.buckets.dense(q.device)
        match term.kind:
            case "bias":
                logits = logits + expanded(term.table, ids)
            case "query":
                logits = logits + lookup(meet(q, term.table), ids)
            case "key":
                rows = meet(k * call.scale, term.table)
                logits = logits + lookup(rows, ids.transpose(-2, -1)).transpose(-2, -1)
    mask, dead = call.merged_mask()
    if mask is not None:
        additive = mask.is_floating_point()
        logits = logits + mask if additive else logits.masked_fill(~mask, float("-inf"))
    probabilities = logits.softmax(-1)
    if dead is not None:
        probabilities = probabilities.masked_fill(dead, 0.0)
    if keep is not None:
        probabilities = probabilities * keep
    elif call.dropout_p > 0.0:
        probabilities = F.dropout(probabilities, call.dropout_p)
    out = probabilities @ v
    for term in call.terms:
        if term.kind == "value":
            ids = term.buckets.dense(q.device)
            ids = ids.unsqueeze(1) if ids.dim() == 3 else ids
            mass = probabilities.new_zeros(*probabilities.shape[:-1], term.buckets.size)
            mass = mass.scatter_add(-1, ids.expand_as(probabilities), probabilities)
            out = out + meet(mass, term.table)
    return out
