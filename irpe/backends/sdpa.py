"""torch's scaled_dot_product_attention, with the logit terms as one materialised bias."""

import torch.nn.functional as F
from torch import Tensor

from .call import Call, expanded, meet


def unsupported(kinds: frozenset[str]) -> str | None:
    """Why these kinds of terms cannot be computed, None if they can."""
    refused = kinds & {"value", "gain"}
    if not refused:
        return None
    return f"{' and '.join(sorted(refused))} terms do not fit into a bias on the logits"


def attention(call: Call) -> Tensor:
    """``[B, H, L, D]``."""
    q = call.q
    k, v = call.grouped()
    bias: Tensor | None = None
    for term in call.terms:
        if term.kind == "bias":
            value = expanded(term.table, term.buckets.dense(q.device))
        else:
            x = q if term.kind == "query" else k
            rows = meet(x, term.table * call.scale).flatten(2)
            flat = term.buckets.flat(q.device).expand(*rows.shape[:2], -1)
            value = rows.gather(-1, flat).view(*rows.shape[:2], q.shape[-2], k.shape[-2])
        bias = value if bias is None else bias + value
    mask, dead = call.merged_mask()
    if bias is None:
        bias = mask
    elif mask is not None:
        bias = bias + mask if mask.is_floating_point() else bias.masked_fill(~mask, float("-inf"))
    if bias is not None and bias.is_floating_point():
        bias = bias.to(q.dtype)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, dropout_p=call.dropout_p, scale=call.scale
    )
    return out if dead is None else out.masked_fill(dead, 0.0)
