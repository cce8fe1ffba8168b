"""torch's scaled_dot_product_attention, with the logit terms as one materialised bias.

Causal ALiBi in 16 bits needs no bias. A softmax does not depend on a constant added to a row, so
slope * (p_i - p_j) may be replaced by slope * -p_j, which is a product of one more channel in
q . k. It is split into a high and a low part in two channels: 16 bits in bfloat16, 22 in float16.
Positions are relative to the middle query, so the values near the diagonal are small. In float32
the large values would cost the logits precision.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Geometry
from ..terms import KINDS
from .call import Call, added, project

# The extra channels of keys have positions in this unit, so that they fit in float16.
UNIT = 256
# Explicit positions that span more get a bias, for precision.
SPAN = 2**13


def unsupported(call: Call) -> str | None:
    """Return why the call is unsupported, or None."""
    refused = sorted(kind for kind in call.kinds if not KINDS[kind].in_bias)
    if not refused:
        return None
    return f"{' and '.join(refused)} terms cannot be expressed as an additive bias"


def preference(call: Call) -> tuple[int, str] | None:
    """Return the rank of this backend for a call, and why."""
    if not call.terms:
        return 100, "no terms, so this is plain attention"
    if in_channels(call):
        return 95, "two extra channels hold the slopes: no materialised bias"
    if call.device.type == "cuda":
        return 30, "torch's fused kernel takes the terms as one bias (predicted, not measured)"
    return None


def attention(call: Call) -> Tensor:
    """Return ``[B, H, L, E]``."""
    q = call.q
    k, v = call.grouped()
    bias: Tensor | None = None
    inner_q, inner_k = q, k
    channels = in_channels(call)
    for term in call.terms:
        if term.kind == "slope" and channels:
            inner_q, inner_k = with_slope(call, term.table, term.buckets.geometry, k)
            continue
        if term.kind in ("bias", "slope"):
            value = added(term, q)
        else:
            x = q if term.kind == "query" else k
            rows = project(x, term.table * call.scale).flatten(2)
            flat = term.buckets.flat(q.device).expand(*rows.shape[:2], -1)
            value = rows.gather(-1, flat).view(*rows.shape[:2], q.shape[-2], k.shape[-2])
        bias = value if bias is None else bias + value
    causal, alone = False, call.is_causal and call.mask is None and bias is None
    # torch's causal mask needs no memory, and is the same if L = S.
    if alone and not torch.jit.is_tracing() and q.shape[-2] == k.shape[-2]:
        causal = True  # a bool: the comparison of symbolic sizes is a symbol
    mask, dead = (None, None) if causal else call.merged_mask()
    if bias is None:
        bias = mask
    elif mask is not None:
        bias = bias + mask if mask.is_floating_point() else bias.masked_fill(~mask, float("-inf"))
    if bias is not None and bias.is_floating_point():
        bias = bias.to(q.dtype)
    wide = inner_q.shape[-1] - v.shape[-1]
    if wide > 0:  # fused kernels need equal head dims
        v = F.pad(v, (0, wide))
    out = F.scaled_dot_product_attention(
        inner_q,
        inner_k,
        v,
        attn_mask=bias,
        dropout_p=call.dropout_p,
        is_causal=causal,
        scale=call.scale,
    )
    out = out[..., :-wide] if wide > 0 else out
    return out if dead is None else out.masked_fill(dead, 0.0)


def in_channels(call: Call) -> bool:
    """Return whether the only term of a call is a slope that two extra channels can hold.

    A visible key must not have a later position than its query, so attention must be causal and
    positions must increase. Positions that cannot be read (traced, or on a GPU) return False.
    """
    if call.kinds != {"slope"} or not call.is_causal or len(call.terms) > 1 or call.scale <= 0:
        return False
    geometry = call.terms[0].buckets.geometry
    if call.q.element_size() != 2 or call.terms[0].table.requires_grad:
        return False
    if geometry.axes != 1 or geometry.prefix or geometry.key_prefix:
        return False
    if not geometry.explicit:
        return True
    given = geometry.readable()
    return given is not None and geometry.remember("causal", lambda: _close(*given))


def _close(query: Tensor, key: Tensor) -> bool:
    """Return whether positions increase, span at most SPAN, and visible keys precede queries."""
    span = torch.maximum(query.amax(-2), key.amax(-2)) - torch.minimum(query.amin(-2), key.amin(-2))
    if bool((span > SPAN).any()):
        return False
    early = key.shape[-2] - query.shape[-2]
    last = key.narrow(-2, max(early, 0), key.shape[-2] - max(early, 0))
    own = query.narrow(-2, max(-early, 0), last.shape[-2])
    return bool((key.diff(dim=-2) >= 0).all()) and bool((own >= last).all())


def with_slope(call: Call, table: Tensor, geometry: Geometry, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries ``[B, H, L, D + 2]`` and keys ``[B, H, S, D + 2]`` that include the slope."""
    q, heads = call.q, call.q.shape[1]
    wide = torch.float32 if q.device.type == "mps" else torch.float64

    def build() -> tuple[Tensor, Tensor, Tensor]:
        # slope / scale = 2 ** exponent * rest with rest in [1, 2). The query has the power, which
        # is exact in any dtype; the key has rest times its position.
        mantissa, exponent = torch.frexp(-table.to(wide) / call.scale)  # [H | 1, 1]
        query, key = geometry.positions(q.device)
        ends = query[..., :1, :] + query[..., -1:, :]
        origin = torch.div(ends, 2, rounding_mode="floor")
        place = (key - origin).to(wide).squeeze(-1).unsqueeze(-2)  # [(B,) 1, S]
        place = place * (2 * mantissa / UNIT)  # [(B,) H | 1, S]
        high = place.to(k.dtype)
        low = (place - high.to(wide)).to(k.dtype)
        on_q = torch.ldexp(torch.full_like(mantissa, UNIT / 2), exponent).to(q.dtype)
        return table, on_q.unsqueeze(-1), torch.stack((high, low), -1)

    # The cached value keeps the table alive, so no other table has its id.
    key = ("slope", id(table), table._version, call.scale, q.dtype, k.dtype)
    _, on_q, on_k = geometry.remember(key, build)
    on_q = on_q.expand(q.shape[0], heads, q.shape[-2], 2)
    on_k = on_k.expand(k.shape[0], heads, k.shape[-2], 2)
    return torch.cat((q, on_q), -1), torch.cat((k, on_k), -1)
