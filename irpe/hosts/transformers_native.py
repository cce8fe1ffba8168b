"""Attention of transformers' SAM, ViTDet, BEiT and Swin, whose native encodings are fused.

They are fused with ``native="keep"`` too, with the same outputs.
"""

import math
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..encodings.decomposed import decomposed_terms
from ..encodings.window import window_terms
from ..geometry import Geometry, Grid
from ..terms import Term
from .attend import attend


def native_terms(module: Any, geometry: Geometry) -> tuple[Term, ...]:
    """Return the native encoding of an attached attention module as terms."""
    if module.__dict__["rpe_native"] != "fuse":
        return ()
    if isinstance(module, Decomposed):
        assert isinstance(geometry, Grid)
        return decomposed_terms(module.rel_pos_h, module.rel_pos_w, geometry)
    if isinstance(module, Cosine):
        network = module.continuous_position_bias_mlp
        table = network(module.relative_coords_table).flatten(0, -2)
        return window_terms(16 * table.sigmoid(), geometry, tuple(module.window_size))
    bias = module.__dict__["rpe_bias"]
    table, window = bias.relative_position_bias_table, tuple(bias.window_size)
    if not geometry.prefix:
        return window_terms(table, geometry, window)
    assert isinstance(geometry, Grid)
    return window_terms(_interpolated(table, window, geometry), geometry)


def _interpolated(table: Tensor, window: tuple[int, ...], grid: Grid) -> Tensor:
    """Interpolate BEiT's table for a grid; like transformers, with height and width swapped."""
    height, width = (2 * side - 1 for side in window)
    size = (2 * grid.height - 1, 2 * grid.width - 1)
    if (width, height) == size:
        return table
    patches, others = table[:-3].T.unflatten(-1, (width, height)), table[-3:]
    patches = F.interpolate(patches.unsqueeze(0), size=size, mode="bilinear")
    return torch.cat((patches[0].flatten(1).T, others))


class _Attached(nn.Module):
    if TYPE_CHECKING:  # transformers' attributes

        def __getattr__(self, name: str) -> Any: ...


class Decomposed(_Attached):
    """SAM's and ViTDet's attention: ``[B, height, width, C]``, with terms for rows and columns."""

    def forward(self, hidden_states: Tensor, output_attentions: bool | None = False) -> Any:
        size, heads = hidden_states.shape[1:3], heads_of(self)
        qkv = self.qkv(hidden_states).flatten(1, 2).unflatten(-1, (3, heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        sam, grid = hasattr(self, "use_rel_pos"), Grid(*size)
        eager = sam and "Sdpa" not in type(self).__name__  # has dropout and returns weights
        x, weights = attend(
            self,
            q,
            k,
            v,
            grid,
            scale=self.scale,
            dropout_p=self.dropout if eager and self.training else 0.0,
            need_weights=eager or bool(output_attentions and not sam),
            native=native_terms(self, grid),
        )
        out = self.proj(x.transpose(1, 2).flatten(2).unflatten(1, size))
        if sam:
            return out, None if weights is None else weights.flatten(0, 1)
        return (out,) if weights is None else (out, weights)


class Cosine(_Attached):
    """Swin V2's attention: normalised queries and keys, and a scale for each head."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        q, k, v = (
            layer(hidden_states).unflatten(-1, (heads_of(self), -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        if attention_mask is not None:  # [windows, L, L]; transformers adds it twice
            times = len(hidden_states) // len(attention_mask)
            attention_mask = 2 * attention_mask.unsqueeze(1).repeat(times, 1, 1, 1)
        grid, scale = Grid(*self.window_size), self.logit_scale.clamp(max=math.log(100.0)).exp()
        x, weights = attend(
            self,
            F.normalize(q, dim=-1) * scale,
            F.normalize(k, dim=-1),
            v,
            grid,
            scale=1.0,
            mask=attention_mask,
            dropout_p=self.dropout.p if self.training else 0.0,
            need_weights=bool(kwargs.get("output_attentions", args and args[0])),
            native=native_terms(self, grid),
        )
        x = x.transpose(1, 2).flatten(2)
        return (x,) if weights is None else (x, weights)


class NoBias(nn.Module):
    """A relative bias that terms replace: it adds 0 to the attention mask."""

    def forward(self, *args: Any, **kwargs: Any) -> int:
        return 0


ATTENTION: dict[str, type[nn.Module]] = {
    "SamHQVisionAttention": Decomposed,
    "SamHQVisionSdpaAttention": Decomposed,
    "SamVisionAttention": Decomposed,
    "SamVisionSdpaAttention": Decomposed,
    "Swinv2SelfAttention": Cosine,
    "VitDetAttention": Decomposed,
}


def heads_of(module: Any) -> int:
    """Return the number of heads; its attribute name varies by class."""
    return int(getattr(module, "num_attention_heads", 0) or module.num_heads)


def attached_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of a class of transformers, with its mixin as first base."""
    name = f"Attached_{kind.__module__.split('.')[2]}_{kind.__name__}"
    if name not in globals():
        mixin = ATTENTION.get(kind.__name__, NoBias)
        globals()[name] = type(name, (mixin, kind), {"__module__": __name__})
    made: type[nn.Module] = globals()[name]
    return made


def __getattr__(name: str) -> Any:
    """Return an attached class by name; pickle may read it before this process created it."""
    family, _, kind = name.removeprefix("Attached_").rpartition("_")
    if not name.startswith("Attached_") or not family:
        raise AttributeError(name)
    theirs = import_module(f"transformers.models.{family}.modeling_{family}")
    return attached_class(getattr(theirs, kind))
