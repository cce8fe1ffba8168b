"""Attention inside windows, whose grid the module itself knows.

A window of a grid partition (MaxViT) holds tokens that lie apart; they are counted as neighbours.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import maxxvit, swin_transformer, swin_transformer_v2, swin_transformer_v2_cr
from torch import Tensor

from .core import Core, Equipped, answered, check_readable


class EquippedWindowAttention(Equipped, swin_transformer.WindowAttention):
    """Swin's, whose own bias is added here and whose mask of shifted windows by the self."""

    def _get_rel_pos_bias(self) -> Any:
        bias = super()._get_rel_pos_bias() if self.keeps else None
        return Core(self, self.grid(*self.window_size), bias)


class _Cosine(Equipped):
    """Cosine attention: queries and keys of length one, a scale for each head."""

    def _own_bias(self) -> Tensor:
        """``[1, H, L, L]``."""
        raise NotImplementedError

    def _projected(self, x: Tensor) -> Tensor:
        """``[B, L, 3 C]``."""
        raise NotImplementedError

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B, L, _ = x.shape
        heads = self.num_heads
        qkv = self._projected(x).unflatten(-1, (3, heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scale = self.logit_scale.view(-1, 1, 1).clamp(max=math.log(100.0)).exp()
        core = Core(self, self.grid(*self.window_size), self._own_bias() if self.keeps else None)
        if mask is not None:  # [windows, L, L], the same in every image
            windows = mask.unsqueeze(1).expand(-1, heads, -1, -1)
            core = core.plus(windows.repeat(B // mask.shape[0], 1, 1, 1))
        q, k = F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1)
        x = answered(q.to(v.dtype), k.to(v.dtype), v, core, self.drops, scale=1.0)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class EquippedWindowAttentionV2(_Cosine, swin_transformer_v2.WindowAttention):
    """Swin V2's."""

    def _own_bias(self) -> Tensor:
        area = self.window_size[0] * self.window_size[1]
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        bias = table[self.relative_position_index.view(-1)].view(area, area, -1)
        return 16 * bias.permute(2, 0, 1).sigmoid().unsqueeze(0)

    def _projected(self, x: Tensor) -> Tensor:
        if self.q_bias is None:
            return self.qkv(x)
        check_readable(self)
        parts: list[Any] = [self.q_bias, self.k_bias, self.v_bias]
        return F.linear(x, self.qkv.weight, torch.cat(parts))


class EquippedWindowMultiHeadAttention(_Cosine, swin_transformer_v2_cr.WindowMultiHeadAttention):
    """Swin V2's as Christoph Reich has it."""

    def _own_bias(self) -> Tensor:
        return self._relative_positional_encodings()

    def _projected(self, x: Tensor) -> Tensor:
        return self.qkv(x)


class EquippedAttentionCl(Equipped, maxxvit.AttentionCl):
    """MaxViT's and CoAtNet's, channels last: ``[B, height, width, C]``."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        core = Core(self, self.grid(*x.shape[1:3]), bias if self.keeps else None)
        qkv = self.qkv(x).flatten(1, 2)
        if self.head_first:
            parts = qkv.unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
        else:
            parts = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        out = answered(q, k, v, core, self.drops)
        out = out.transpose(1, 2).flatten(2).unflatten(1, x.shape[1:3])
        return self.proj_drop(self.proj(out))


class EquippedAttention2d(Equipped, maxxvit.Attention2d):
    """The same, channels first: ``[B, C, height, width]``."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        core = Core(self, self.grid(*x.shape[2:]), bias if self.keeps else None)
        qkv = self.qkv(x).flatten(2)
        if self.head_first:
            parts = qkv.unflatten(1, (self.num_heads, 3, -1)).permute(2, 0, 1, 4, 3)
        else:
            parts = qkv.unflatten(1, (3, self.num_heads, -1)).permute(1, 0, 2, 4, 3)
        q, k, v = (part.contiguous() for part in parts.unbind(0))
        out = answered(q, k, v, core, self.drops)
        out = out.transpose(-1, -2).flatten(1, 2).unflatten(-1, x.shape[2:])
        return self.proj_drop(self.proj(out))


KINDS: dict[type, type[Equipped]] = {
    swin_transformer.WindowAttention: EquippedWindowAttention,
    swin_transformer_v2.WindowAttention: EquippedWindowAttentionV2,
    swin_transformer_v2_cr.WindowMultiHeadAttention: EquippedWindowMultiHeadAttention,
    maxxvit.AttentionCl: EquippedAttentionCl,
    maxxvit.Attention2d: EquippedAttention2d,
}
