"""Attention modules of models whose tokens form one sequence, prefix tokens first."""

from typing import Any

from timm.layers import Attention, AttentionRope
from timm.models import beit, eva
from timm.models.vision_transformer import ParallelScalingBlock
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor

from ...geometry import Geometry
from ...terms import Term
from .biases import bias_terms
from .override import Attached, AttentionOverride, attached_classes, run_override


class _Masked(Attached):
    """Attention that takes a mask, and no other position argument."""

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        return super().forward(x, attn_mask=AttentionOverride(self, attn_mask), is_causal=is_causal)


class _Rotated(Attached):
    """Attention that takes a rotary embedding from its model."""

    def forward(
        self, x: Tensor, rope: Any = None, attn_mask: Any = None, is_causal: bool = False
    ) -> Tensor:
        override, rope = AttentionOverride(self, attn_mask), rope if self.keeps else None
        return super().forward(x, rope=rope, attn_mask=override, is_causal=is_causal)


class _Beit(Attached):
    def forward(self, x: Tensor, shared_rel_pos_bias: Any = None) -> Tensor:
        mask, table = self.split(shared_rel_pos_bias)
        override = AttentionOverride(self, mask, table=table)
        return super().forward(x, shared_rel_pos_bias=override)

    def _get_rel_pos_bias(self) -> Any:
        return super()._get_rel_pos_bias() if self.keeps else 0  # type: ignore[misc]

    def native_terms(self, geometry: Geometry) -> tuple[Term, ...]:
        return bias_terms(self, geometry)


class _RelPos(Attached):
    def forward(self, x: Tensor, shared_rel_pos: Any = None) -> Tensor:
        bias, table = self.split(shared_rel_pos)
        if self.keeps and self.rel_pos is not None:
            bias = self.rel_pos.get_bias()
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        override = AttentionOverride(self, bias, table=table)
        x = run_override(self.q_norm(q), self.k_norm(k), v, override, self.drops)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))

    def native_terms(self, geometry: Geometry) -> tuple[Term, ...]:
        return bias_terms(self.rel_pos, geometry)


_MIXINS: dict[type, type[Attached]] = {
    Attention: _Masked,
    AttentionRope: _Rotated,
    ParallelScalingBlock: _Masked,  # a block that is its own attention
    RelPosAttention: _RelPos,
    beit.Attention: _Beit,
    eva.EvaAttention: _Rotated,
}
KINDS = attached_classes(_MIXINS, __name__)
