"""torch's scaled_dot_product_attention, with the logit terms as one materialised bias."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import Call, added, meet


def unsupported(kinds: frozenset[str]) -> str | None:
    """Why these kinds of terms cannot be computed, None if they can."""
    refused = kinds & {"value", "gain", "channels"}
    if not refused:
        return None
    return f"{' and '.join(sorted(refused))} terms do not fit into a bias on the logits"


def attention(call: Call) -> Tensor:
    """``[B, H, L, D]``."""
    q = call.q
    k, v = call.grouped()
    bias: Tensor | None = None
    for term in call.terms:
        if term.kind in ("bias", "slope"):
            value = added(term, q)
        else:
            x = q if term.kind == "query" else k
            rows = meet(x, term.table * call.scale).flatten(2)
            flat = term.buckets.flat(q.device).expand(*rows.shape[:2], -1)
            value = rows.gather(-1, flat).view(*rows.shape[:2], q.shape[-2], k.shape[-2])
        bias = value if bias is None else bias + value
    causal, alone = False, call.is_causal and call.mask is None and bias is None
    # torch's own causal mask costs no memory; where L = S it hides the same keys.
    if alone and not torch.jit.is_tracing() and q.shape[-2] == k.shape[-2]:
        causal = True  # and no symbol, as the comparison of sizes may be
    mask, dead = (None, None) if causal else call.merged_mask()
    if bias is None:
        bias = mask
    elif mask is not None:
        bias = bias + mask if mask.is_floating_point() else bias.masked_fill(~mask, float("-inf"))
    if bias is not None and bias.is_floating_point():
        bias = bias.to(q.dtype)
    wide = q.shape[-1] - v.shape[-1]
    if wide > 0:  # its fused kernels want one head dim
        v = F.pad(v, (0, wide))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, dropout_p=call.dropout_p, is_causal=causal, scale=call.scale
    )
    out = out[..., :-wide] if wide > 0 else out
    return out if dead is None else out.masked_fill(dead, 0.0)
