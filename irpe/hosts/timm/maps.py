"""Attention over feature maps and windows whose forward pass takes no mask.

Nothing can ride through such a forward pass to its one call of ``scaled_dot_product_attention``, so
the call is answered by a mode that is on while it runs. torch.compile takes that in one piece, but
leaves checkpointed blocks of such a model to eager.
"""

import math
from typing import Any

import torch.nn.functional as F
from timm.models import (
    davit,
    fastvit,
    hieradet_sam2,
    nest,
    pvt_v2,
    tiny_vit,
    twins,
    visformer,
    vision_transformer_sam,
    volo,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...geometry import Geometry
from .core import Core, Equipped, answered


class Answer(TorchFunctionMode):
    """Answers the attention of one module, at the positions of one call."""

    def __init__(self, module: Equipped, geometry: Geometry) -> None:
        super().__init__()
        self.module, self.geometry = module, geometry

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if function is not F.scaled_dot_product_attention:
            return function(*args, **given)
        mask = given.pop("attn_mask", None) if self.module.keeps else None
        return answered(*args, **{**given, "attn_mask": Core(self.module, self.geometry, mask)})


class _Map(Equipped):
    """Over the map that comes in: ``place`` finds its grid."""

    def place(self, x: Tensor, *given: Any) -> Geometry:
        raise NotImplementedError

    def forward(self, x: Tensor, *given: Any) -> Tensor:
        with Answer(self, self.place(x, *given)):
            return super().forward(x, *given)


class _First(_Map):
    """``[B, C, height, width]``."""

    def place(self, x: Tensor, *given: Any) -> Geometry:
        return self.grid(*x.shape[2:])


class _Last(_Map):
    """``[B, height, width, C]``."""

    def place(self, x: Tensor, *given: Any) -> Geometry:
        return self.grid(*x.shape[1:3])


class _Told(_Map):
    """``[B, L, C]``, with its (height, width) beside it."""

    def place(self, x: Tensor, *given: Any) -> Geometry:
        return self.grid(*given[0])


class EquippedDavitWindow(_Map, davit.WindowAttention):
    def place(self, x: Tensor, *given: Any) -> Geometry:
        return self.grid(*self.window_size)


class EquippedTinyVit(_Map, tiny_vit.Attention):
    def place(self, x: Tensor, *given: Any) -> Geometry:
        return self.grid(*self.resolution)


class EquippedNest(_Map, nest.Attention):
    """Blocks ``[B, T, N, C]``, square ones; heads ``[B, H, T, N, D]``."""

    def place(self, x: Tensor, *given: Any) -> Geometry:
        side = math.isqrt(x.shape[2])
        return self.grid(side, side)

    def folded(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)

    def unfolded(self, x: Tensor, like: Tensor) -> Tensor:
        return x.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)


class EquippedTwinsLocal(_Map, twins.LocallyGroupedAttn):
    """Heads ``[B, T, H, N, D]``."""

    def place(self, x: Tensor, *given: Any) -> Geometry:
        return self.grid(self.ws, self.ws)

    def folded(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)

    def unfolded(self, x: Tensor, like: Tensor) -> Tensor:
        return x.unflatten(0, like.shape[:2])


class EquippedSam(_Last, vision_transformer_sam.Attention):
    """Heads ``[B * H, N, D]``."""

    def folded(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, self.num_heads))

    def unfolded(self, x: Tensor, like: Tensor) -> Tensor:
        return x.flatten(0, 1)


class EquippedFastVit(_First, fastvit.Attention):
    pass


class EquippedVisformer(_First, visformer.Attention):
    pass


class EquippedVolo(_Last, volo.Attention):
    pass


class EquippedMultiScale(_Last, hieradet_sam2.MultiScaleAttention):
    pass


class EquippedPvt(_Told, pvt_v2.Attention):
    pass


class EquippedTwinsGlobal(_Told, twins.GlobalSubSampleAttn):
    pass


KINDS: dict[type, type[Equipped]] = {
    davit.WindowAttention: EquippedDavitWindow,
    fastvit.Attention: EquippedFastVit,
    hieradet_sam2.MultiScaleAttention: EquippedMultiScale,
    nest.Attention: EquippedNest,
    pvt_v2.Attention: EquippedPvt,
    tiny_vit.Attention: EquippedTinyVit,
    twins.GlobalSubSampleAttn: EquippedTwinsGlobal,
    twins.LocallyGroupedAttn: EquippedTwinsLocal,
    visformer.Attention: EquippedVisformer,
    vision_transformer_sam.Attention: EquippedSam,
    volo.Attention: EquippedVolo,
}


def obstacle(module: Any) -> str | None:
    """Why a module of these kinds has queries and keys in different places; None if not."""
    if getattr(module, "sr", None) is not None:
        return f"{type(module).__name__}'s keys are summaries of several patches, in no one place"
    if getattr(module, "q_pool", None) is not None:
        return f"{type(module).__name__}'s queries are pooled from several patches, in no one place"
    return None
