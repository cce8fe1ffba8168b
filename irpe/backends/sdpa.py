"""torch's scaled_dot_product_attention, with the logit terms as one materialised bias.

Causal ALiBi in 16 bits needs no bias: a softmax does not change where a whole row gets the same
number, so slope * (p_i - p_j) may be slope * -p_j, which is one more product in q . k. Two extra
channels hold it, its high and its low part: 16 bits in bfloat16, 22 in float16. Positions count
from the middle query, so the numbers near the diagonal are small, wherever the text starts. In
float32 they would cost the logits their last bits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Geometry
from ..terms import KINDS
from .call import Call, added, project

# The extra channels of keys count positions in this unit, so that float16 holds them.
UNIT = 256
# Given positions that span more get a bias: logits would be off by more than they round.
SPAN = 2**13


def unsupported(call: Call) -> str | None:
    """Return why this call cannot be computed, None if it can."""
    refused = sorted(kind for kind in call.kinds if not KINDS[kind].in_bias)
    if not refused:
        return None
    return f"{' and '.join(refused)} terms do not fit into a bias on the logits"


def preference(call: Call) -> tuple[int, str] | None:
    """Return the rank of this backend for a call, and why."""
    if not call.terms:
        return 100, "no terms, so this is plain attention"
    if in_channels(call):
        return 95, "two extra channels hold the slopes: no bias in memory"
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
    wide = inner_q.shape[-1] - v.shape[-1]
    if wide > 0:  # its fused kernels need one head dim
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
    """Return whether the one term of a call is a slope that two extra channels can hold.

    No key that a query sees may come after it, so attention is causal and positions increase.
    Positions that cannot be read, in a traced graph or on a GPU, do not count as increasing.
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
    """Whether positions increase, no visible key is after its query, and all span at most SPAN."""
    span = torch.maximum(query.amax(-2), key.amax(-2)) - torch.minimum(query.amin(-2), key.amin(-2))
    if bool((span > SPAN).any()):
        return False
    early = key.shape[-2] - query.shape[-2]
    last = key.narrow(-2, max(early, 0), key.shape[-2] - max(early, 0))
    own = query.narrow(-2, max(-early, 0), last.shape[-2])
    return bool((key.diff(dim=-2) >= 0).all()) and bool((own >= last).all())


def with_slope(call: Call, table: Tensor, geometry: Geometry, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries ``[B, H, L, D + 2]`` and keys ``[B, H, S, D + 2]`` whose products hold it."""
    q, heads = call.q, call.q.shape[1]
    wide = torch.float32 if q.device.type == "mps" else torch.float64

    def build() -> tuple[Tensor, Tensor, Tensor]:
        # slope / scale = 2 ** exponent * rest with rest in [1, 2): the query has the first, exact
        # in any dtype, the key the second times its position.
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

    # The value holds the table, so no other one has its id while the value is cached.
    key = ("slope", id(table), table._version, call.scale, q.dtype, k.dtype)
    _, on_q, on_k = geometry.remember(key, build)
    on_q = on_q.expand(q.shape[0], heads, q.shape[-2], 2)
    on_k = on_k.expand(k.shape[0], heads, k.shape[-2], 2)
    return torch.cat((q, on_q), -1), torch.cat((k, on_k), -1)
