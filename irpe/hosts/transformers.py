"""Hugging Face's transformers: image encoders whose attention goes through its interface.

An equipped module asks for the attention function named "irpe", which runs its encodings; all else
of the model, and the choice of the modules that are not equipped, stays. The patch projection tells
the grid, see ``place``; a layer that is recomputed in a backward pass is handed its own once more.
"""

import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ..encodings import build, hooks
from ..errors import IrpeError
from ..functional import attention
from ..geometry import Geometry
from ..spec import Spec
from .mha import probabilities
from .place import Slot, forget, here, locate, located, placeable, unhook
from .site import Site, misplaced_on_image, put_on, take_off

# What stands before the patches, in the order of the embeddings' own forward pass.
PREFIX: dict[str, tuple[str, ...]] = {
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
}


def sites(model: nn.Module) -> Iterator["EncoderSite"]:
    """The attention modules of all image encoders in a model."""
    for path, root in model.named_modules():
        embeddings: Any = getattr(root, "embeddings", None)
        if not type(embeddings).__module__.startswith("transformers."):
            continue
        projection = next((m for m in embeddings.modules() if isinstance(m, nn.Conv2d)), None)
        if projection is None:  # a text's
            continue
        for base, layers in root.named_modules(prefix=path):
            if isinstance(layers, nn.ModuleList):
                for number, layer in layers.named_children():
                    for name, module in layer.named_modules(prefix=f"{base}.{number}"):
                        if hasattr(module, "config") and hasattr(module, "is_causal"):
                            yield EncoderSite(name, module, layer, layers, embeddings, projection)


class EncoderSite(Site):
    """One attention module, its layer, the list of layers, and what makes their tokens."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        layer: nn.Module,
        layers: nn.ModuleList,
        embeddings: nn.Module,
        projection: nn.Conv2d,
    ) -> None:
        super().__init__(name, module)
        self.module: Any = module
        self.layer, self.layers = layer, layers
        self.embeddings, self.projection = embeddings, projection

    @property
    def equipped(self) -> bool:
        return isinstance(self.module.config, Config)

    def obstacle(self, spec: Spec) -> str | None:
        kind = type(self.embeddings).__name__
        if kind not in PREFIX:
            return (
                f"how {kind} lays out its tokens is not known; what can be equipped has "
                f"{', '.join(sorted(PREFIX))}"
            )
        if not placeable(self.layers):
            return f"its layers are a {type(self.layers).__name__}, not a ModuleList"
        forward: Any = inspect.unwrap(type(self.module).forward)
        _settle(self.layer)
        if "forward" in vars(self.layer):
            return "the forward pass of its layer is wrapped already: attach before that"
        if "ALL_ATTENTION_FUNCTIONS" not in forward.__code__.co_names:
            return f"{type(self.module).__name__} does not use transformers' AttentionInterface"
        return misplaced_on_image(spec)

    def equip(self, spec: Spec, backend: str) -> None:
        tokens = [getattr(self.embeddings, name) for name in PREFIX[type(self.embeddings).__name__]]
        prefix = sum(1 if token.dim() == 1 else token.shape[-2] for token in tokens)
        module, config = self.module, self.module.config
        weight = next(
            (p for p in module.parameters() if p.is_floating_point()), self.projection.weight
        )
        encodings = build(
            spec,
            dim=config.hidden_size,
            num_heads=config.num_attention_heads,
            head_dim=getattr(module, "head_dim", None),
            prefix=prefix > 0,
            device=weight.device,
            dtype=weight.dtype,
        )
        locate(self.projection, self.layers, prefix)
        hooked = any(isinstance(h, ReadKept) for h in self.embeddings._forward_hooks.values())
        slot: Any = self.layers.slot
        if type(self.embeddings).__name__ == "ViTMAEEmbeddings" and not hooked:
            self.embeddings.register_forward_hook(ReadKept(slot))
        if not isinstance(self.layer, LocatedLayer):
            kind: Any = type(self.layer)
            self.layer.__class__ = _located(kind)
        put_on(module, encodings)
        module.rpe_backend = backend
        module.config = Config(config)

    def strip(self) -> None:
        module: Any = self.module
        take_off(module)
        del module.rpe_backend
        module.config = module.config.host
        if isinstance(self.layer, LocatedLayer) and not _holds_equipped(self.layer):
            layer: Any = self.layer
            _settle(layer)
            layer.__class__ = layer.host_class()
        if not _holds_equipped(self.layers):
            forget(self.projection, self.layers)
            unhook(self.embeddings, ReadKept)


def _settle(layer: nn.Module) -> None:
    """Forget what version 4 leaves on layers whose outputs it has recorded: their own forward."""
    bound = vars(layer).get("forward")
    if bound is not None and getattr(bound, "__func__", None) is type(layer).forward:
        del layer.forward


def _holds_equipped(part: nn.Module) -> bool:
    return any(isinstance(getattr(m, "config", None), Config) for m in part.modules())


class Config:
    """A host's configuration, but that one module's attention is irpe's."""

    _attn_implementation = "irpe"

    def __init__(self, host: Any) -> None:
        self.host = host

    def __getattr__(self, name: str) -> Any:
        if name == "host":  # not there yet while it is unpickled
            raise AttributeError(name)
        return getattr(self.host, name)


class ReadKept:
    """Forward hook of a masked autoencoder's embeddings: which patches they keep, in what order."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot

    def __call__(self, embeddings: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> None:
        tokens, _, restore = output
        if self.slot.geometry is not None:
            patches = tokens.shape[1] - self.slot.geometry.prefix
            self.slot.keep(restore.argsort(dim=1)[:, :patches])


class LocatedLayer(nn.Module):
    """Mixed into a layer: its grid is an argument, which gradient checkpointing keeps."""

    @classmethod
    def host_class(cls) -> type[nn.Module]:
        return cls.__mro__[cls.__mro__.index(LocatedLayer) + 1]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, rpe_geometry=here(), **kwargs)

    def forward(self, *args: Any, rpe_geometry: Geometry | None = None, **kwargs: Any) -> Any:
        if rpe_geometry is None:
            return super().forward(*args, **kwargs)
        with located(rpe_geometry):
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (self.host_class(),), self.__dict__


@cache
def _located(host: type[nn.Module]) -> type[LocatedLayer]:
    """Named as the host's: accelerate looks for layers by that."""
    named = {"__module__": host.__module__, "__qualname__": host.__qualname__}
    return type(host.__name__, (LocatedLayer, host), named)


def _blank(host: Any) -> nn.Module:
    cls = _located(host)
    return cls.__new__(cls)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls for an equipped module; arguments and results are its own."""
    geometry = here()
    if geometry is None:
        raise IrpeError(
            "no grid: this layer was called by itself. Call the whole model, or the layer inside "
            "`with irpe.located(irpe.Grid(height, width, prefix)):`"
        )
    owner: Any = module
    mask, encodings = _mask(owner, attention_mask), hooks(module)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key = encodings.transform(query, key, geometry)
    terms, backend = encodings.terms(geometry), owner.rpe_backend
    x = attention(query, key, value, terms, mask, dropout_p=dropout, scale=scale, backend=backend)
    weights = None
    if owner.config.host._attn_implementation == "eager":  # the only one that gives them
        weights = probabilities(query, key, terms, mask, scale)
    return x.transpose(1, 2), weights


def _mask(module: nn.Module, mask: Any) -> Tensor | None:
    if mask is None:
        return None
    if "head_mask" in inspect.signature(type(module).forward).parameters:  # before 5.0
        raise IrpeError("head_mask does not go together with irpe: leave it out")
    if not isinstance(mask, torch.Tensor):
        raise IrpeError(
            f"a mask of type {type(mask).__name__}: model.set_attn_implementation('sdpa') makes "
            "one that irpe understands"
        )
    return mask[:, None, None].bool() if mask.dim() == 2 else mask


AttentionInterface.register("irpe", attend)
