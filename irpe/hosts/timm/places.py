"""Where timm's models can be equipped."""

from collections.abc import Iterator
from typing import Any

from timm.models import beit, eva, naflexvit, vision_transformer, vision_transformer_relpos
from torch import nn

from ...encodings import build
from ...spec import Spec
from ..site import Site, misplaced_on_image, put_on, take_off
from . import flat, travel, windows
from .core import Equipped, width

# Models that keep their tokens in one row.
ROWS = (
    vision_transformer.VisionTransformer,
    beit.Beit,
    eva.Eva,
    naflexvit.NaFlexVit,
    vision_transformer_relpos.VisionTransformerRelPos,
)
KINDS: dict[type, type[Equipped]] = {**flat.KINDS, **windows.KINDS}
_BACK = {equipped: plain for plain, equipped in KINDS.items()}
_WINDOWS: Any = tuple(windows.KINDS)


def sites(model: nn.Module) -> Iterator[Site]:
    """The attention modules of a model."""
    known = (*flat.KINDS, *flat.KINDS.values())
    named: list[tuple[str, Any]] = list(model.named_modules())
    for path, host in named:
        if isinstance(host, ROWS):
            for number, block in host.blocks._modules.items():
                base = ".".join(filter(None, (path, "blocks", number)))
                found = {n: m for n, m in block.named_modules() if isinstance(m, known)}
                chosen: dict[str, Any] = found or {"": block}
                for name, module in chosen.items():
                    yield _RowSite(".".join(filter(None, (base, name))), module, block, host)
        elif isinstance(host, _WINDOWS):
            yield _TimmSite(path, host)


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
        if kind not in KINDS and kind not in _BACK:
            return (
                f"{kind.__name__} computes its attention in its own way; "
                "timm's Attention can be equipped"
            )
        return misplaced_on_image(spec)

    def possession(self) -> str | None:
        own = ("relative_position_bias_table", "rel_pos", "cpb_mlp", "meta_mlp")
        held = any(getattr(self.module, name, None) is not None for name in own)
        return "relative bias" if held else None

    def equip(self, spec: Spec, backend: str) -> None:
        self._equip(spec, backend, prefix=False)

    def _equip(self, spec: Spec, backend: str, prefix: bool) -> None:
        module, weight = self.module, next(self.module.parameters())
        _prepare(module)
        head_dim = width(module)
        encodings = build(
            spec,
            dim=module.num_heads * head_dim,
            num_heads=module.num_heads,
            head_dim=head_dim,
            prefix=prefix,
            device=weight.device,
            dtype=weight.dtype,
        )
        put_on(module, encodings)
        module.rpe_backend, module.rpe_own = backend, self.own

    def strip(self) -> None:
        _restore(self.module)


class _RowSite(_TimmSite):
    """A module of a model that keeps its tokens in one row."""

    def __init__(self, name: str, module: nn.Module, block: nn.Module, host: nn.Module) -> None:
        super().__init__(name, module)
        self.block = block
        self.host: Any = host

    def obstacle(self, spec: Spec) -> str | None:
        return super().obstacle(spec) or travel.obstacle(self.host)

    def possession(self) -> str | None:
        if getattr(self.host, "rope", None) is not None:
            return "rotary embedding"
        shared = (getattr(self.host, name, None) for name in ("rel_pos_bias", "shared_rel_pos"))
        if any(part is not None for part in shared):
            return "relative bias"
        return super().possession()

    def equip(self, spec: Spec, backend: str) -> None:
        # The whole block is handed the geometry, so every attention in it must understand it.
        for module in self.block.modules():
            if type(module) in flat.KINDS:
                _prepare(module)
        travel.locate(self.host, self.module.argument)
        self._equip(spec, backend, prefix=self.host.num_prefix_tokens > 0)

    def strip(self) -> None:
        for module in self.block.modules():
            if isinstance(module, Equipped):
                _restore(module)
        travel.forget(self.host)


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
