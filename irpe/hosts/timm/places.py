"""Where timm's models can be equipped."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from timm.models import (
    beit,
    crossvit,
    deepseek_vit,
    eva,
    mobilevit,
    naflexvit,
    pit,
    qwen3_vit,
    vision_transformer,
    vision_transformer_relpos,
)
from torch import nn

from ...encodings import Encoding, build
from ...errors import IrpeError
from ...spec import Spec
from ..site import Site, misplaced_on_image, put_on, take_off
from . import flat, maps, travel, windows
from .core import Equipped, unreadable, width
from .refused import reason

# Models that keep their tokens in one row, and the argument that their blocks hand through.
ROWS: dict[type, str | None] = {
    vision_transformer.VisionTransformer: None,
    beit.Beit: None,
    deepseek_vit.DeepseekVitEncoder: "rope",
    eva.Eva: None,
    naflexvit.NaFlexVit: None,
    qwen3_vit.Qwen3VitEncoder: None,
    vision_transformer_relpos.VisionTransformerRelPos: None,
}
_HOSTS: Any = tuple(ROWS)
KINDS: dict[type, type[Equipped]] = {**flat.KINDS, **windows.KINDS, **maps.KINDS}
_BACK = {equipped: plain for plain, equipped in KINDS.items()}
_FLAT = (*flat.KINDS, *flat.KINDS.values())
# What hosts call their own relative biases, of a module or shared by all.
_BIASES = (
    "relative_position_bias_table",
    "rel_pos",
    "rel_pos_bias",
    "shared_rel_pos",
    "rel_pos_h",
    "cpb_mlp",
    "meta_mlp",
    "attention_biases",
)


def sites(model: nn.Module) -> Iterator[Site]:
    """The attention modules of a model, those that cannot be equipped too."""
    rows = dict(_in_rows(model))
    named: list[tuple[str, Any]] = list(model.named_modules())
    for path, module in named:
        kind = type(module)
        if id(module) in rows:
            yield _RowSite(path, module, *rows[id(module)])
        elif kind in _FLAT:
            yield _Refused(
                path, module, f"positions do not reach this {kind.__name__} through its model"
            )
        elif kind in KINDS or kind in _BACK:
            yield _TimmSite(path, module)
        else:
            why = reason(module)
            if why is not None:
                yield _Refused(path, module, why)


def _in_rows(model: nn.Module) -> Iterator[tuple[int, tuple[nn.Module, travel.Row]]]:
    """Attention modules by id, each with its block and what its tokens go through."""
    for host in model.modules():
        for row in _rows(host):
            for block in row.blocks._modules.values():
                found = [m for m in block.modules() if isinstance(m, _FLAT)]
                other = [m for m in block.modules() if reason(m) is not None]
                for module in found or other or [block]:
                    yield id(module), (block, row)


def _rows(host: Any) -> Iterator[travel.Row]:
    """What keeps its tokens in one row here: a model, its stages or branches."""
    if isinstance(host, _HOSTS):
        argument = next(a for kind, a in ROWS.items() if isinstance(host, kind))
        embed = host.patch_embed if hasattr(host, "patch_embed") else host.embeds
        yield travel.Row(host, host.blocks, embed, host.num_prefix_tokens, argument)
    elif isinstance(host, pit.PoolingVisionTransformer):
        for stage in host.transformers._modules.values():
            embed = host.patch_embed if stage.pool is None else stage.pool
            prefix = host.cls_token.shape[1]
            yield travel.Row(stage, stage.blocks, embed, prefix, reader=travel.ReadMap)
    elif isinstance(host, crossvit.CrossVit):
        for block in host.blocks._modules.values():
            for blocks, embed in zip(block.blocks, host.patch_embed, strict=True):
                yield travel.Row(block, blocks, embed.proj, 1, reader=travel.ReadMap)
    elif isinstance(host, mobilevit.MobileVitBlock):
        reader = partial(travel.ReadMap, patch=host.patch_size)
        yield travel.Row(host, host.transformer, host.conv_1x1, 0, reader=reader)


class _Refused(Site):
    """Attention that cannot be equipped, as its host is known to be."""

    equipped = False

    def __init__(self, name: str, module: nn.Module, why: str) -> None:
        super().__init__(name, module)
        self.why = why

    def obstacle(self, spec: Spec) -> str | None:
        return f"{self.why}; where= can choose others"

    def equip(self, spec: Spec, backend: str) -> None:
        raise NotImplementedError

    def strip(self) -> None:
        raise NotImplementedError


class _TimmSite(Site):
    """A module that sees by itself where its tokens are, as inside a window."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        self.module: Any = module

    @property
    def equipped(self) -> bool:
        return isinstance(self.module, Equipped) and self.module.has_encoding

    def obstacle(self, spec: Spec) -> str | None:
        kind = type(self.module)
        why = maps.obstacle(self.module) or unreadable(self.module)
        if kind not in KINDS and kind not in _BACK:
            why = reason(self.module) or f"{kind.__name__} computes its attention in its own way"
        if why is not None:
            return f"{why}; where= can choose others"
        why = misplaced_on_image(spec)
        if why is None:
            try:  # a width of heads that the encoding cannot have shows before anything is changed
                self._built(spec, device="meta")
            except IrpeError as error:
                why = str(error)
        return why

    def possession(self) -> str | None:
        held = any(getattr(self.module, name, None) is not None for name in _BIASES)
        return "relative bias" if held else None

    @property
    def prefix(self) -> bool:
        """Whether tokens without a place stand before the others."""
        return False

    def equip(self, spec: Spec, backend: str) -> None:
        # A module that is quantised whole has no parameters; it runs on a CPU, in float32.
        weight = next(self.module.parameters(), torch.empty(0, device="cpu", dtype=torch.float32))
        encodings = self._built(spec, device=weight.device, dtype=weight.dtype)
        _prepare(self.module)
        put_on(self.module, encodings)
        self.module.rpe_backend, self.module.rpe_own = backend, self.own

    def _built(self, spec: Spec, **made: Any) -> dict[str, Encoding]:
        heads, head_dim = self.module.num_heads, width(self.module)
        sizes = {"dim": heads * head_dim, "num_heads": heads, "head_dim": head_dim}
        return build(spec, **sizes, prefix=self.prefix, **made)

    def strip(self) -> None:
        _restore(self.module)


class _RowSite(_TimmSite):
    """A module of a model that keeps its tokens in one row."""

    def __init__(self, name: str, module: nn.Module, block: nn.Module, row: travel.Row) -> None:
        super().__init__(name, module)
        self.block = block
        self.row = row

    def obstacle(self, spec: Spec) -> str | None:
        return super().obstacle(spec) or travel.obstacle(self.row)

    def possession(self) -> str | None:
        if getattr(self.row.model, "rope", None) is not None:
            return "rotary embedding"
        shared = (
            getattr(self.row.model, name, None) for name in ("rel_pos_bias", "shared_rel_pos")
        )
        if any(part is not None for part in shared):
            return "relative bias"
        return super().possession()

    @property
    def prefix(self) -> bool:
        return self.row.prefix > 0

    def equip(self, spec: Spec, backend: str) -> None:
        # The whole block is handed the geometry, so every attention in it must understand it.
        for module in self.block.modules():
            if type(module) in flat.KINDS:
                _prepare(module)
        travel.locate(self.row, self.module.argument)
        super().equip(spec, backend)

    def strip(self) -> None:
        for module in self.block.modules():
            if isinstance(module, Equipped):
                _restore(module)
        travel.forget(self.row)


def _prepare(module: Any) -> None:
    if not isinstance(module, Equipped):
        module.__class__ = KINDS[type(module)]
        put_on(module, {})
        module.rpe_backend, module.rpe_own = "auto", "keep"


def _restore(module: Any) -> None:
    take_off(module)
    for name in ("rpe_backend", "rpe_own", "rpe_grid"):
        module.__dict__.pop(name, None)
    module.__class__ = _BACK[type(module)]
