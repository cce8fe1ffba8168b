"""Attention over feature maps and windows, whose grid follows from the input shape.

The grid attention of MaxViT is over distant tokens; their positions count as adjacent.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm import models
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...encodings.decomposed import decomposed_terms
from ...encodings.window import window_terms
from ...geometry import Grid
from ...terms import Term
from .biases import bias_terms
from .override import Attached, AttentionOverride, attached_classes, run_override


class _Intercept(TorchFunctionMode):
    """Intercepts scaled_dot_product_attention in a module whose forward pass takes no mask.

    torch.compile traces this mode without a graph break, but runs checkpointed blocks eagerly.
    """

    def __init__(self, module: Attached, grid: Grid) -> None:
        super().__init__()
        self.module, self.grid = module, grid

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if function is not F.scaled_dot_product_attention:
            return function(*args, **given)
        mask = given.pop("attn_mask", None) if self.module.keeps else None
        override = AttentionOverride(self.module, mask, self.grid)
        return run_override(*args, **{**given, "attn_mask": override})


class _Map(Attached):
    """Input ``[B, C, height, width]``; subclasses with another input override ``grid``."""

    def grid(self, x: Tensor, *given: Any) -> Grid:
        """Return the grid, from the arguments of the forward pass."""
        return Grid(*x.shape[2:])

    def forward(self, x: Tensor, *given: Any) -> Tensor:
        with _Intercept(self, self.grid(x, *given)):
            return super().forward(x, *given)


class _Last(_Map):
    """``[B, height, width, C]``."""

    def grid(self, x: Tensor, *given: Any) -> Grid:
        return Grid(*x.shape[1:3])


class _Sized(_Map):
    """``[B, L, C]``, with (height, width) as second argument."""

    def grid(self, x: Tensor, *given: Any) -> Grid:
        return Grid(*given[0])


class _Window(_Map):
    """A window whose size is an attribute."""

    def grid(self, x: Tensor, *given: Any) -> Grid:
        return Grid(*self.window_size)


class _TinyVit(_Map):
    """A window with a bias for each absolute distance (rows, columns)."""

    def grid(self, x: Tensor, *given: Any) -> Grid:
        return Grid(*self.resolution)

    def get_attention_biases(self, device: torch.device) -> Any:
        return super().get_attention_biases(device) if self.keeps else None  # type: ignore[misc]

    def native_terms(self, grid: Grid) -> tuple[Term, ...]:
        sides = (
            torch.arange(1 - n, n, device=self.attention_biases.device) for n in self.resolution
        )
        rows, columns = (side.abs() for side in sides)
        ids = rows.unsqueeze(1) * grid.width + columns
        return window_terms(self.attention_biases.index_select(1, ids.flatten()).t(), grid)


class _Nest(_Map):
    """Square blocks ``[B, T, N, C]``; heads ``[B, H, T, N, D]``."""

    def grid(self, x: Tensor, *given: Any) -> Grid:
        side = math.isqrt(x.shape[2])
        return Grid(side, side)

    def folded(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)

    def unfolded(self, x: Tensor, like: Tensor) -> Tensor:
        return x.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)


class _TwinsLocal(_Map):
    """Square windows; heads ``[B, T, H, N, D]``."""

    def grid(self, x: Tensor, *given: Any) -> Grid:
        return Grid(self.ws, self.ws)

    def folded(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)

    def unfolded(self, x: Tensor, like: Tensor) -> Tensor:
        return x.unflatten(0, like.shape[:2])


class _Sam(_Last):
    """Heads ``[B * H, N, D]``."""

    @property
    def use_rel_pos(self) -> bool:
        """Whether timm computes its native bias."""
        return bool(self.__dict__["use_rel_pos"]) and self.rpe_native != "fuse"

    @use_rel_pos.setter
    def use_rel_pos(self, value: bool) -> None:
        self.__dict__["use_rel_pos"] = value

    def native_terms(self, grid: Grid) -> tuple[Term, ...]:
        return decomposed_terms(self.rel_pos_h, self.rel_pos_w, grid)

    def folded(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, self.num_heads))

    def unfolded(self, x: Tensor, like: Tensor) -> Tensor:
        return x.flatten(0, 1)


class _Swin(Attached):
    """Swin's."""

    def _get_rel_pos_bias(self) -> Any:  # timm adds the mask of shifted windows to the result
        bias: Any = super()
        bias = bias._get_rel_pos_bias() if self.keeps else None
        return AttentionOverride(self, bias, Grid(*self.window_size))

    def native_terms(self, grid: Grid) -> tuple[Term, ...]:
        return bias_terms(self, grid)


class _Cosine(Attached):
    """Cosine attention: normalised queries and keys, and a scale for each head."""

    def _native_bias(self) -> Tensor:
        """``[1, H, L, L]``."""
        raise NotImplementedError

    def _projected(self, x: Tensor) -> Tensor:
        """``[B, L, 3 C]``."""
        return self.qkv(x)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        bias = self._native_bias() if self.keeps else None
        override = AttentionOverride(self, bias, Grid(*self.window_size))
        heads = self.num_heads
        qkv = self._projected(x).unflatten(-1, (3, heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scale = self.logit_scale.view(-1, 1, 1).clamp(max=math.log(100.0)).exp()
        if mask is not None:  # [windows, L, L], the same in every image
            windows = mask.unsqueeze(1).expand(-1, heads, -1, -1)
            override = override.plus(windows.repeat(x.shape[0] // mask.shape[0], 1, 1, 1))
        q, k = F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1)
        x = run_override(q.to(v.dtype), k.to(v.dtype), v, override, self.drops, scale=1.0)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class _SwinV2(_Cosine):
    """Swin V2's."""

    def _native_table(self) -> Tensor:
        """``[N, H]``."""
        made: Tensor = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        return 16 * made.sigmoid()

    def _native_bias(self) -> Tensor:
        area = self.window_size[0] * self.window_size[1]
        bias = self._native_table()[self.relative_position_index.view(-1)].view(area, area, -1)
        return bias.permute(2, 0, 1).unsqueeze(0)

    def native_terms(self, grid: Grid) -> tuple[Term, ...]:
        return window_terms(self._native_table(), grid)

    def _projected(self, x: Tensor) -> Tensor:
        if self.q_bias is None:
            return self.qkv(x)
        parts: list[Any] = [self.q_bias, self.k_bias, self.v_bias]
        return F.linear(x, self.qkv.weight, torch.cat(parts))


class _SwinV2Cr(_Cosine):
    """Swin V2's, in Christoph Reich's version."""

    unfused = "in training, the network of its bias has dropout for each pair of patches"

    def _native_bias(self) -> Tensor:
        return self._relative_positional_encodings()


class _MaxVit(Attached):
    """MaxViT's and CoAtNet's: ``[B, C, height, width]``, or ``[B, height, width, C]`` (Cl)."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        last, bias = isinstance(self, models.maxxvit.AttentionCl), None
        if self.keeps:
            bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        size = x.shape[1:3] if last else x.shape[2:]
        override, qkv = AttentionOverride(self, bias, Grid(*size)), self.qkv(x)
        qkv = qkv.flatten(1, 2) if last else qkv.flatten(2).transpose(1, 2)
        if self.head_first:
            parts = qkv.unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
        else:
            parts = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = (part if last else part.contiguous() for part in parts.unbind(0))
        out = run_override(q, k, v, override, self.drops)
        if last:
            out = out.transpose(1, 2).flatten(2).unflatten(1, size)
        else:
            out = out.transpose(-1, -2).flatten(1, 2).unflatten(-1, size)
        return self.proj_drop(self.proj(out))

    def native_terms(self, grid: Grid) -> tuple[Term, ...]:
        return bias_terms(self.rel_pos, grid)


_MIXINS: dict[type, type[Attached]] = {
    models.davit.WindowAttention: _Window,
    models.fastvit.Attention: _Map,
    models.hieradet_sam2.MultiScaleAttention: _Last,
    models.nest.Attention: _Nest,
    models.pvt_v2.Attention: _Sized,
    models.maxxvit.Attention2d: _MaxVit,
    models.maxxvit.AttentionCl: _MaxVit,
    models.swin_transformer.WindowAttention: _Swin,
    models.swin_transformer_v2.WindowAttention: _SwinV2,
    models.swin_transformer_v2_cr.WindowMultiHeadAttention: _SwinV2Cr,
    models.tiny_vit.Attention: _TinyVit,
    models.twins.GlobalSubSampleAttn: _Sized,
    models.twins.LocallyGroupedAttn: _TwinsLocal,
    models.visformer.Attention: _Map,
    models.vision_transformer_sam.Attention: _Sam,
    models.volo.Attention: _Last,
}
KINDS = attached_classes(_MIXINS, __name__)


def unsupported(module: Any) -> str | None:
    """Return why queries or keys of a module have no position; None if they have."""
    if getattr(module, "sr", None) is not None:
        return f"{type(module).__name__}'s keys are pooled from several patches"
    if getattr(module, "q_pool", None) is not None:
        return f"{type(module).__name__}'s queries are pooled from several patches"
    return None
