"""Attention modules of timm that attach does not support, and why. All are reported."""

import re
from typing import Any

from torch import nn

from .override import Attached

# Attention of one query (class attention, pooling) or over channels has no pairs of positions.
_WITHOUT_POSITIONS = re.compile(
    "ChannelAttention|ChannelAttentionV2|CrossCovarianceAttn|XCA|ClassAttn|ClassAttention|"
    "LayerScaleBlockClassAttn|CrossAttention|AttentionPool.*|RotAttentionPool2d|SpatialAttention"
)
_NAMED = re.compile("Attention|Attn|MHSA|SHMA|SHSA|XCA|Lambda")
# Gates of convolutional networks are all of timm.layers except these files.
_GATES = re.compile(
    r"timm\.layers\.(?!attention2d|bottleneck_attn|halo_attn|diff_attention|lambda_layer|attention$)"
)
_REASONS = {
    "TalkingHeadAttn": "it mixes heads before and after its softmax",
    "DiffAttention": "it takes the difference of two softmaxes",
    "OutlookAttention": "it has no keys",
    "MultiQueryAttention2d": "its keys are pooled from several patches",
    "MaskUnitAttention": "its tokens are ordered by mask units",
    "LinearSelfAttention": "its cost is linear, so it has no logits to add to",
    "FactorAttnConvRelPosEnc": "its cost is linear, so it has no logits to add to",
    "EfficientAdditiveAttention": "its cost is linear, so it has no logits to add to",
}


def reason(module: nn.Module) -> str | None:
    """Return why attach does not support a timm module; None if its name is not of attention."""
    kind: Any = type(module)
    if not kind.__module__.startswith("timm.") or _GATES.match(kind.__module__):
        return None
    if isinstance(module, Attached) or not _NAMED.search(kind.__name__):
        return None
    if _WITHOUT_POSITIONS.fullmatch(kind.__name__):
        return None
    inside = (m for m in module.modules() if m is not module)
    if any(isinstance(m, Attached) or _NAMED.search(type(m).__name__) for m in inside):
        return None  # the attention is inside it
    why = _REASONS.get(kind.__name__, "it computes its attention in its own way")
    return f"{kind.__name__} of {kind.__module__}: {why}"
