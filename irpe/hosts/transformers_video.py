"""transformers' TimeSformer, with joint and with divided attention.

Joint attention is over all patches of a video; the frames of one patch are neighbours in the
sequence. Divided attention is over the frames of a patch (positions on one axis), then over the
patches of a frame (rows and columns)::

    irpe.attach(model, {"*temporal_attention*": "rope", "*": "rope-axial"})
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.timesformer.modeling_timesformer import TimesformerSelfAttention

from ..geometry import Geometry, Grid, Sequence, Volume
from ..spec import Spec
from .attend import attend
from .base import Site, plain_class
from .carry import carry_geometry, geometry_of, stop_carrying


def find_sites(path: str, root: Any) -> Iterator["TimesformerSite"]:
    """Yield the attention modules of a TimesformerModel at a path."""
    for name, module in root.named_modules(prefix=path):
        if issubclass(plain_class(module), TimesformerSelfAttention):
            yield TimesformerSite(name, module, root)


class VideoAttention(TimesformerSelfAttention):
    """Attention with encodings, over the tokens of a whole video."""

    def place(self, geometry: Geometry) -> Geometry:
        """Return the geometry of one call, from that of the whole video."""
        return geometry

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Any, ...]:
        qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x, weights = attend(
            self,
            q,
            k,
            v,
            self.place(geometry_of(self)),
            scale=self.scale,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            need_weights=output_attentions,
        )
        x = x.transpose(1, 2).flatten(2)
        return (x, weights) if output_attentions else (x,)


class FrameAttention(VideoAttention):
    """Attention over the class token and the patches of one frame."""

    def place(self, geometry: Geometry) -> Geometry:
        if not isinstance(geometry, Volume):  # from irpe.located
            return geometry
        return Grid(geometry.height, geometry.width, geometry.prefix)


class TimeAttention(VideoAttention):
    """Attention over the frames of one patch."""

    def place(self, geometry: Geometry) -> Geometry:
        return Sequence(geometry.frames) if isinstance(geometry, Volume) else geometry


class TimesformerSite(Site):
    """One attention module of a TimesformerModel."""

    def __init__(self, name: str, module: nn.Module, root: Any) -> None:
        super().__init__(name, module)
        self.root = root
        if ".temporal_attention." in f".{name}":
            self.kind, self.axes = TimeAttention, 1
        elif root.config.attention_type == "joint_space_time":
            self.kind, self.axes = VideoAttention, 3
        else:
            self.kind, self.axes = FrameAttention, 2

    def unsupported(self, spec: Spec) -> str | None:
        if self.axes == 1 and 1 not in spec.axes:
            return (
                f"{spec} is not for positions on one axis, and temporal attention is over frames: "
                f'{{"*temporal_attention*": "rope", "*": "{spec}"}} attaches another encoding to it'
            )
        return super().unsupported(spec)

    def sizes(self) -> dict[str, Any]:
        made = {"dim": self.module.qkv.in_features, "num_heads": self.module.num_heads}
        return made | {"prefix": int(self.axes != 1), "axes": max(self.axes or 2, 2)}

    def add(self, spec: Spec | None, *, backend: str, native: str) -> None:
        super().add(spec, backend=backend, native=native)
        read = read_joint if self.axes == 3 else read_video
        carry_geometry(self.root, self.root.embeddings.patch_embeddings, self.module, 1, read)

    def remove(self) -> None:
        super().remove()
        stop_carrying(self.root, self.module)


def read_video(embed: Any, args: Any, kwargs: Any, output: Any, prefix: int) -> Geometry:
    """Return the volume of an output (patches ``[B T, h w, C]``, T, w)."""
    patches, frames, width = output
    return Volume(frames, patches.shape[1] // width, width, prefix)


def read_joint(embed: Any, args: Any, kwargs: Any, output: Any, prefix: int) -> Geometry:
    """Return the same volume in the order of joint attention: the frames of each patch together."""
    patches, frames, width = output
    volume = Volume(frames, patches.shape[1] // width, width, prefix)
    places = torch.arange(frames * patches.shape[1], device=patches.device)
    return volume.select(places.view(frames, -1).t().flatten())
