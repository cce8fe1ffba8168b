"""Hugging Face's transformers: encoders of images and videos.

An attached module uses the attention function named "irpe", which runs its encodings. The rest of
the model, with its attention function, is unchanged. TimeSformer has no such option, see
transformers_video.py.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface

from ..errors import IrpeError
from ..geometry import Grid
from ..spec import Spec
from .attend import attend
from .base import Site, change_class, freeze, plain_class, restore_class, rotates, unfreeze
from .carry import carry_geometry, geometry_of, select_by, stop_carrying
from .transformers_native import ATTENTION, Decomposed, attached_class, heads_of, native_terms

_NATIVE = ("relative_position_bias", "rel_pos_h", "rel_pos_w", "continuous_position_bias_mlp")
# The prefix tokens of each embedding class, in order.
PREFIX: dict[str, tuple[str, ...]] = {
    "BeitEmbeddings": ("cls_token",),
    "CLIPVisionEmbeddings": ("class_embedding",),
    "DINOv3ViTEmbeddings": ("cls_token", "register_tokens"),
    "DeiTEmbeddings": ("cls_token", "distillation_token"),
    "Dinov2Embeddings": ("cls_token",),
    "Dinov2WithRegistersEmbeddings": ("cls_token", "register_tokens"),
    "IJepaEmbeddings": (),
    "SiglipVisionEmbeddings": (),
    "ViTEmbeddings": ("cls_token",),
    "ViTMAEEmbeddings": ("cls_token",),
    "ViTMSNEmbeddings": ("cls_token",),
    "VideoMAEEmbeddings": (),
    "VivitEmbeddings": ("cls_token",),
}
# The methods of ``Slot`` that select the unmasked patches, by embedding class.
MASKED = {"ViTMAEEmbeddings": "select_restored", "VideoMAEEmbeddings": "select_unmasked"}


def find_sites(model: nn.Module) -> Iterator[Site]:
    """Yield the attention modules of all image and video encoders in a model."""
    for path, module in model.named_modules():
        kind = plain_class(module)
        known = kind.__name__ in (*ATTENTION, "SwinAttention")
        if known and kind.__module__.startswith("transformers.models."):
            yield WindowSite(path, module)
    for path, root in model.named_modules():
        embeddings: Any = getattr(root, "embeddings", None)
        if not type(embeddings).__module__.startswith("transformers."):
            continue
        convolutions = (m for m in embeddings.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
        projection = next(convolutions, None)
        if projection is None:  # text embeddings
            continue
        if type(embeddings).__name__ == "TimesformerEmbeddings":
            from .transformers_video import find_sites as find  # which imports TimeSformer

            yield from find(path, root)
            continue
        for base, layers in root.named_modules(prefix=path):
            if isinstance(layers, nn.ModuleList):
                for name, module in layers.named_modules(prefix=base):
                    if hasattr(module, "config") and hasattr(module, "is_causal"):
                        yield EncoderSite(name, module, root, embeddings, projection)


class NativeSite(Site):
    """One attention module, whose native encoding, if any, is computed as terms."""

    axes = 2
    bias: Any = None  # the module of a native relative bias

    def native(self) -> str | None:
        held = (getattr(self.module, name, None) for name in _NATIVE)
        return (
            "relative bias" if self.bias is not None or any(x is not None for x in held) else None
        )

    def unfused(self, spec: Spec | None) -> str | None:
        if self.native() is None:
            return super().unfused(spec)
        if isinstance(self.kind, type) and issubclass(self.kind, Decomposed) and rotates(spec):
            return f"its vectors are multiplied with unrotated queries, but {spec} rotates them"
        return None

    def add(self, spec: Spec | None, *, backend: str, native: str) -> None:
        if native == "keep" and self.native() is not None:
            native = "fuse"
        super().add(spec, backend=backend, native=native)
        if native == "replace":
            freeze(self.module, _NATIVE)
        if self.bias is not None:
            self.module.__dict__["rpe_bias"] = self.bias
            change_class(self.bias, attached_class(plain_class(self.bias)))
            if native == "replace":
                freeze(self.bias, ("relative_position_bias_table",))

    def remove(self) -> None:
        super().remove()
        self.module.__dict__.pop("rpe_bias", None)
        if self.bias is not None:
            restore_class(self.bias)
            unfreeze(self.bias)


class WindowSite(NativeSite):
    """A module whose input has its grid: SAM's, ViTDet's, or Swin's window attention."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        kind = plain_class(module)
        if kind.__name__ in ATTENTION:
            self.kind = attached_class(kind)
        else:
            self.bias = getattr(module, "relative_position_bias", None)

    def unfused(self, spec: Spec | None) -> str | None:
        return self._old() or super().unfused(spec)

    def unsupported(self, spec: Spec) -> str | None:
        why = self._old() if self.native() is None else self.unfused(spec)
        return why or super().unsupported(spec)

    def _old(self) -> str | None:
        if int(transformers.__version__.partition(".")[0]) >= 5:
            return None
        name = plain_class(self.module).__name__
        return f"{name} needs transformers 5, and this is {transformers.__version__}"

    def sizes(self) -> dict[str, Any]:
        heads = heads_of(self.module)
        made = (getattr(self.module, name, None) for name in ("proj", "o_proj", "value"))
        dim = next(layer.in_features for layer in made if layer is not None)
        return {"dim": dim, "num_heads": heads, "head_dim": dim // heads, "prefix": 0}

    def add(self, spec: Spec | None, *, backend: str, native: str) -> None:
        super().add(spec, backend=backend, native=native)
        if self.bias is not None:
            self.module.config = Config(self.module.config)

    def remove(self) -> None:
        super().remove()
        if self.bias is not None:
            self.module.config = self.module.config.native


class EncoderSite(NativeSite):
    """One attention module of an encoder.

    Args:
        name: path of the module in the model.
        module: the attention module.
        root: the encoder.
        embeddings: its embeddings.
        projection: the patch projection of the embeddings.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        root: nn.Module,
        embeddings: nn.Module,
        projection: nn.Conv2d | nn.Conv3d,
    ) -> None:
        super().__init__(name, module)
        self.axes = 3 if isinstance(projection, nn.Conv3d) else 2
        self.root, self.embeddings, self.projection = root, embeddings, projection
        owners = (m for m in root.modules() if module in m.children())
        self.bias = getattr(next(owners), "relative_position_bias", None)  # BEiT's

    def unfused(self, spec: Spec | None) -> str | None:
        return self._shared() or super().unfused(spec)

    def _shared(self) -> str | None:
        if getattr(self.root, "shared_position_bias", None) is None:
            return None
        return "all layers share its relative bias (use_shared_relative_position_bias)"

    def unsupported(self, spec: Spec) -> str | None:
        if (why := self._shared()) is not None:
            return why
        kind = type(self.embeddings).__name__
        if kind not in PREFIX:
            return (
                f"the order of the tokens of {kind} is not known; supported are "
                f"{', '.join(sorted(PREFIX))}"
            )
        forward: Any = inspect.unwrap(type(self.module).forward)
        if "ALL_ATTENTION_FUNCTIONS" not in forward.__code__.co_names:
            return f"{type(self.module).__name__} does not use transformers' AttentionInterface"
        return super().unsupported(spec)

    def sizes(self) -> dict[str, Any]:
        tokens = [getattr(self.embeddings, n) for n in PREFIX[type(self.embeddings).__name__]]
        return {
            "dim": self.module.config.hidden_size,
            "num_heads": self.module.config.num_attention_heads,
            "head_dim": getattr(self.module, "head_dim", None),
            "prefix": sum(1 if token.dim() == 1 else token.shape[-2] for token in tokens),
            "axes": self.axes,
        }

    def add(self, spec: Spec | None, *, backend: str, native: str) -> None:
        prefix = self.sizes()["prefix"]
        super().add(spec, backend=backend, native=native)
        slot = carry_geometry(self.root, self.projection, self.module, prefix)
        masked = MASKED.get(type(self.embeddings).__name__)
        if masked is not None:
            select_by(self.embeddings, getattr(slot, masked))
        self.module.config = Config(self.module.config)

    def remove(self) -> None:
        super().remove()
        self.module.config = self.module.config.native
        stop_carrying(self.root, self.module)


class Config:
    """The configuration of a module, with irpe's attention function."""

    _attn_implementation = "irpe"

    def __init__(self, native: Any) -> None:
        self.native = native

    def __getattr__(self, name: str) -> Any:
        if name == "native":  # missing while unpickling: avoid infinite recursion
            raise AttributeError(name)
        return getattr(self.native, name)


def run_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute the attention of an attached module; transformers calls it, with its arguments."""
    bias = module.__dict__.get("rpe_bias")
    windows = bias is not None and "rpe_slot" not in module.__dict__
    geometry = Grid(*bias.window_size) if windows else geometry_of(module)
    x, weights = attend(
        module,
        query,
        key,
        value,
        geometry,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        mask=_mask(module, attention_mask),
        dropout_p=dropout,
        need_weights=module.config.native._attn_implementation == "eager",  # as transformers does
        native=native_terms(module, geometry),
    )
    return x.transpose(1, 2), weights


def _mask(module: nn.Module, mask: Any) -> Tensor | None:
    if mask is None or isinstance(mask, int):  # 0: see NoBias
        return None
    if "head_mask" in inspect.signature(type(module).forward).parameters:  # before 5.0
        raise IrpeError("irpe does not support head_mask: leave it out")
    if not isinstance(mask, torch.Tensor):
        raise IrpeError(
            f"a mask of type {type(mask).__name__} is not supported: "
            "model.set_attn_implementation('sdpa') makes a tensor"
        )
    return mask[:, None, None].bool() if mask.dim() == 2 else mask


AttentionInterface.register("irpe", run_attention)
