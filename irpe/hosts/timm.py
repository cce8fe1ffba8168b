"""timm's VisionTransformer family.

How the grid travels: the patch embedding's output tells it, anew in each forward pass; the
blocks, when they are gone through, are handed out with that grid bound to them; and each block
passes it to its attention as an argument. So a block that is recomputed in a backward pass
(gradient checkpointing) is called with the grid of its own forward pass, whatever ran in between.
"""

import threading
from collections.abc import Iterator
from typing import Any

from timm.layers import Attention
from timm.layers.patch_dropout import PatchDropout, patch_dropout_forward
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..encodings import build, hooks
from ..errors import IrpeError
from ..functional import attention
from ..geometry import Geometry, Grid
from ..spec import Spec
from .site import Site, misplaced, put_on, take_off


def sites(model: nn.Module) -> Iterator[Site]:
    """The attention modules of all VisionTransformers in a model."""
    for path, vit in model.named_modules():
        if not isinstance(vit, VisionTransformer):
            continue
        for number, block in vit.blocks.named_children():
            base = ".".join(filter(None, (path, "blocks", number)))
            found = {n: m for n, m in block.named_modules() if isinstance(m, Attention)}
            for name, module in (found or {"": block}).items():
                yield _VitSite(".".join(filter(None, (base, name))), module, block, vit)


class _VitSite(Site):
    def __init__(
        self, name: str, module: nn.Module, block: nn.Module, vit: VisionTransformer
    ) -> None:
        super().__init__(name, module)
        self.module: Any = module
        self.block = block
        self.vit: Any = vit

    @property
    def equipped(self) -> bool:
        return isinstance(self.module, EquippedAttention) and self.module.has_encoding

    def obstacle(self, spec: Spec) -> str | None:
        if type(self.module) not in (Attention, EquippedAttention):
            return (
                f"{type(self.module).__name__} computes its attention in its own way; "
                "timm's Attention can be equipped"
            )
        if type(self.vit.blocks) not in (nn.Sequential, LocatedBlocks):
            return f"its blocks are a {type(self.vit.blocks).__name__}, not a Sequential"
        if type(self.vit.patch_drop) not in (nn.Identity, PatchDropout, LocatedPatchDropout):
            return f"{type(self.vit.patch_drop).__name__} does not tell which patches it keeps"
        if 2 not in spec.axes and not spec.at_input:
            return f"{spec} is for positions on one axis, and an image's are (row, column)"
        return misplaced(spec)

    def equip(self, spec: Spec, backend: str) -> None:
        _locate(self.vit)
        # The whole block is handed the geometry, so every attention in it must understand it.
        siblings: list[Any] = [m for m in self.block.modules() if type(m) is Attention]
        for sibling in siblings:
            sibling.__class__ = EquippedAttention
            put_on(sibling, {})
            sibling.rpe_backend = "auto"
        module, weight = self.module, self.module.qkv.weight
        encodings = build(
            spec,
            dim=module.attn_dim,
            num_heads=module.num_heads,
            head_dim=module.head_dim,
            prefix=self.vit.num_prefix_tokens > 0,
            device=weight.device,
            dtype=weight.dtype,
        )
        put_on(module, encodings)
        module.rpe_backend = backend

    def strip(self) -> None:
        for module in self.block.modules():
            if isinstance(module, EquippedAttention):
                take_off(module)
                del module.rpe_backend
                module.__class__ = Attention
        if not any(_takes_geometry(block) for block in self.vit.blocks.children()):
            _forget(self.vit)


class EquippedAttention(Attention):
    """timm's Attention with a position encoding."""

    @property
    def has_encoding(self) -> bool:
        """Not for one that only shares its block with an equipped one."""
        return bool(hooks(self).encodings)

    def forward(
        self, x: Tensor, attn_mask: "Located | None" = None, is_causal: bool = False
    ) -> Tensor:
        if not isinstance(attn_mask, Located):
            raise IrpeError(
                "no grid: this block was called by itself. Go through model.blocks after "
                "model.patch_embed(image), as the model's own forward does"
            )
        B, L, _ = x.shape
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        qkv = self.qkv(x).reshape(B, L, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        encodings, geometry = hooks(self), attn_mask.geometry
        q, k = encodings.transform(self.q_norm(q), self.k_norm(k), geometry)
        x = attention(
            q,
            k,
            v,
            encodings.terms(geometry),
            mask=attn_mask.mask,
            is_causal=is_causal,
            dropout_p=self.attn_drop.p if self.attn_drop.training else 0.0,
            scale=self.scale,
            backend=self.rpe_backend,
        )
        x = self.norm(x.transpose(1, 2).reshape(B, L, self.attn_dim))
        x = x if gate is None else x * gate
        return self.proj_drop(self.proj(x))


class Located:
    """A geometry on its way to the attention modules, in the place of the mask that it carries."""

    def __init__(self, geometry: Geometry, mask: Tensor | None) -> None:
        self.geometry, self.mask = geometry, mask


class LocatedBlock:
    """A block with the geometry of one forward pass; all else is the block's."""

    def __init__(self, block: nn.Module, geometry: Geometry) -> None:
        self._block, self._geometry = block, geometry

    def __call__(self, x: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        return self._block(x, attn_mask=Located(self._geometry, attn_mask), **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


class Slot(threading.local):
    """Carries a geometry from the patch embedding to the blocks of the same forward pass."""

    geometry: Grid | None = None

    def take(self) -> Grid | None:
        geometry, self.geometry = self.geometry, None
        return geometry

    def __reduce__(self) -> tuple[type["Slot"], tuple[()]]:
        return Slot, ()


class LocatedBlocks(nn.Sequential):
    """A VisionTransformer's blocks; bound to a geometry if the patch embedding has just run."""

    slot: Slot

    def _bound(self) -> list[Any]:
        blocks = list(self._modules.values())
        geometry = self.slot.take()
        if geometry is None:
            return blocks
        return [LocatedBlock(b, geometry) if _takes_geometry(b) else b for b in blocks]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._bound())

    def children(self) -> Iterator[Any]:
        return iter(self._bound())

    def __getitem__(self, index: Any) -> Any:
        item = super().__getitem__(index)
        if isinstance(item, LocatedBlocks):  # a slice goes on where this one stands
            item.slot = self.slot
        return item


class LocatedPatchDropout(PatchDropout):
    """timm's PatchDropout, which tells the blocks what it keeps."""

    slot: Slot

    def forward(self, x: Tensor) -> Tensor:
        x, kept = patch_dropout_forward(
            x, self.prob, self.num_prefix_tokens, self.ordered, self.training
        )
        if kept is not None and self.slot.geometry is not None:
            self.slot.geometry = self.slot.geometry.select(kept)
        return x


class ReadGrid:
    """Forward hook of a patch embedding: the grid of its output."""

    def __init__(self, slot: Slot, prefix: int) -> None:
        self.slot, self.prefix = slot, prefix

    def __call__(self, embed: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.dim() == 4:
            height, width = output.shape[1:3]
        else:
            height, width = embed.dynamic_feat_size(tuple(inputs[0].shape[-2:]))
        self.slot.geometry = Grid(height, width, self.prefix)


def _takes_geometry(block: nn.Module) -> bool:
    return any(isinstance(module, EquippedAttention) for module in block.modules())


def _locate(vit: VisionTransformer) -> None:
    if isinstance(vit.blocks, LocatedBlocks):
        return
    slot = Slot()
    vit.blocks.__class__ = LocatedBlocks
    vit.blocks.slot = slot
    if type(vit.patch_drop) is PatchDropout:
        vit.patch_drop.__class__ = LocatedPatchDropout
        vit.patch_drop.slot = slot
    vit.patch_embed.register_forward_hook(ReadGrid(slot, vit.num_prefix_tokens))


def _forget(vit: VisionTransformer) -> None:
    vit.blocks.__class__ = nn.Sequential
    del vit.blocks.slot
    if type(vit.patch_drop) is LocatedPatchDropout:
        vit.patch_drop.__class__ = PatchDropout
        del vit.patch_drop.slot
    hooks = vit.patch_embed._forward_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, ReadGrid)]:
        del hooks[key]
