"""Attention modules of models that keep their tokens in one row, prefix tokens first."""

from typing import Any

from timm.layers import Attention, AttentionRope
from timm.models import beit, eva
from timm.models.vision_transformer import ParallelScalingBlock
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor

from .core import Core, Equipped, Located, answered, check_readable, opened


class _Masked(Equipped):
    """Handed a mask, and nothing else to tell positions by."""

    argument = "attn_mask"

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        place = opened(attn_mask)
        core = Core(self, place.geometry, place.carried)
        return super().forward(x, attn_mask=core, is_causal=is_causal)


class EquippedAttention(_Masked, Attention):
    pass


class EquippedParallelScalingBlock(_Masked, ParallelScalingBlock):
    """A block that is its own attention."""


class _Rotated(Equipped):
    """With a rotary embedding that the model hands in."""

    argument = "attn_mask"

    def forward(
        self, x: Tensor, rope: Any = None, attn_mask: Any = None, is_causal: bool = False
    ) -> Tensor:
        told = isinstance(rope, Located)  # by a block that hands no mask through
        place = opened(rope if told else attn_mask)
        core = Core(self, place.geometry, attn_mask if told else place.carried)
        rope = (place.carried if told else rope) if self.keeps else None
        check_readable(self)
        return super().forward(x, rope=rope, attn_mask=core, is_causal=is_causal)


class EquippedAttentionRope(_Rotated, AttentionRope):
    pass


class EquippedEvaAttention(_Rotated, eva.EvaAttention):
    pass


class EquippedBeitAttention(Equipped, beit.Attention):
    argument = "shared_rel_pos_bias"

    def forward(self, x: Tensor, shared_rel_pos_bias: Any = None) -> Tensor:
        place = opened(shared_rel_pos_bias)
        core = Core(self, place.geometry, place.carried if self.keeps else None)
        check_readable(self)
        return super().forward(x, shared_rel_pos_bias=core)

    def _get_rel_pos_bias(self) -> Tensor:
        if self.keeps:
            return super()._get_rel_pos_bias()
        return self.relative_position_bias_table.new_zeros(())


class EquippedRelPosAttention(Equipped, RelPosAttention):
    argument = "shared_rel_pos"

    def forward(self, x: Tensor, shared_rel_pos: Any = None) -> Tensor:
        place = opened(shared_rel_pos)
        bias = place.carried if self.rel_pos is None else self.rel_pos.get_bias()
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        core = Core(self, place.geometry, bias if self.keeps else None)
        x = answered(self.q_norm(q), self.k_norm(k), v, core, self.drops)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


KINDS: dict[type, type[Equipped]] = {
    Attention: EquippedAttention,
    AttentionRope: EquippedAttentionRope,
    ParallelScalingBlock: EquippedParallelScalingBlock,
    RelPosAttention: EquippedRelPosAttention,
    beit.Attention: EquippedBeitAttention,
    eva.EvaAttention: EquippedEvaAttention,
}
