"""The attention modules of timm's models, and the source of their grids."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from timm import models
from torch import nn

from ...spec import Spec
from ..base import Site, change_class, freeze, plain_class, restore_class, rotates, unfreeze
from ..carry import Reader, carry_geometry, located_prefix, stop_carrying
from . import biases, maps, patches, rows
from .override import Attached, unreadable, width
from .unsupported import reason

# Models whose tokens form one sequence.
_ROW_MODELS: Any = (
    models.vision_transformer.VisionTransformer,
    models.beit.Beit,
    models.deepseek_vit.DeepseekVitEncoder,
    models.eva.Eva,
    models.naflexvit.NaFlexVit,
    models.qwen3_vit.Qwen3VitEncoder,
    models.vision_transformer_relpos.VisionTransformerRelPos,
)
KINDS: dict[type, type[Attached]] = {**rows.KINDS, **maps.KINDS}
_IN_ROWS = tuple(rows.KINDS)
# Attributes with native relative biases: of a module, and of a model for all its modules.
_BIASES = (
    "relative_position_bias_table", "rel_pos", "rel_pos_bias", "shared_rel_pos", "rel_pos_h",
    "rel_pos_w", "cpb_mlp", "meta_mlp", "attention_biases",
)  # fmt: skip
_SHARED = ("rope", "rel_pos_bias", "shared_rel_pos")


@dataclass(frozen=True, slots=True)
class Row:
    """Blocks that run on one sequence of tokens.

    Args:
        model: the model that calls them.
        blocks: the blocks.
        embed: the patch embedding.
        prefix: number of tokens before the patches.
        read: returns the geometry of a call of the embedding.
    """

    model: Any
    blocks: Any
    embed: Any
    prefix: int
    read: Reader = patches.read_embedding

    def modules(self) -> list[nn.Module]:
        """Return the attention modules; of blocks without any, the unsupported modules."""
        found: list[nn.Module] = []
        for block in self.blocks._modules.values():
            inside: list[nn.Module] = list(block.modules())
            found += (
                [m for m in inside if isinstance(m, _IN_ROWS)]
                or [m for m in inside if reason(m) is not None]
                or [block]
            )
        return found


def _rows(model: Any) -> Iterator[Row]:
    """Yield the rows of one model."""
    if isinstance(model, _ROW_MODELS):
        embed = model.patch_embed if hasattr(model, "patch_embed") else model.embeds
        yield Row(model, model.blocks, embed, model.num_prefix_tokens)
    elif isinstance(model, models.pit.PoolingVisionTransformer):
        for stage in model.transformers._modules.values():
            embed = model.patch_embed if stage.pool is None else stage.pool
            yield Row(model, stage.blocks, embed, model.cls_token.shape[1], patches.read_patches)
    elif isinstance(model, models.crossvit.CrossVit):
        for block in model.blocks._modules.values():
            for blocks, embed in zip(block.blocks, model.patch_embed, strict=True):
                yield Row(model, blocks, embed.proj, 1, patches.read_patches)
    elif isinstance(model, models.mobilevit.MobileVitBlock):
        read = partial(patches.read_patches, patch=model.patch_size)
        yield Row(model, model.transformer, model.conv_1x1, 0, read)


def find_sites(model: nn.Module) -> Iterator[Site]:
    """Yield the attention modules of a model, the unsupported ones too."""
    in_rows: dict[int, Row] = {}
    in_models: set[int] = set()
    for module in model.modules():
        in_rows |= {id(m): row for row in _rows(module) for m in row.modules()}
        whole = type(module).__module__.startswith("timm.models.")
        if whole and hasattr(module, "forward_features"):
            in_models |= {id(m) for m in module.modules()}
    named: list[tuple[str, Any]] = list(model.named_modules())
    for path, module in named:
        kind = plain_class(module)
        if id(module) in in_rows:
            yield RowSite(path, module, in_rows[id(module)])
        elif kind in _IN_ROWS and id(module) not in in_models:
            yield LocatedSite(path, module)
        elif kind in _IN_ROWS:
            why = f"the positions of this {kind.__name__} cannot be read from its model"
            yield TimmSite(path, module, why)
        elif kind in KINDS or reason(module) is not None:
            yield TimmSite(path, module)


class TimmSite(Site):
    """A module whose grid follows from its input, as in a window; or an unsupported module.

    Args:
        name: path of the module in the model.
        module: the attention module.
        why: the unsupported reason, if it depends on the model.
    """

    axes: int | None = 2
    prefix = 0

    def __init__(self, name: str, module: nn.Module, why: str | None = None) -> None:
        super().__init__(name, module)
        self.kind, self.why = KINDS.get(plain_class(module)), why

    def unsupported(self, spec: Spec) -> str | None:
        kind = plain_class(self.module)
        why = self.why or maps.unsupported(self.module) or unreadable(self.module)
        if kind not in KINDS:
            why = reason(self.module) or f"{kind.__name__} computes its attention in its own way"
        return super().unsupported(spec) if why is None else f"{why}; where= can choose others"

    def native(self) -> str | None:
        held = any(getattr(self.module, name, None) is not None for name in _BIASES)
        return "relative bias" if held else None

    def unfused(self, spec: Spec | None) -> str | None:
        kind: Any = self.kind
        if kind is None or kind.native_terms is Attached.native_terms or self.native() is None:
            why = getattr(kind, "unfused", None) or super().unfused(spec)
            return f"{why}; where= can choose others"
        if rotates(spec) and issubclass(kind, models.vision_transformer_sam.Attention):
            return f"its vectors are multiplied with unrotated queries, but {spec} rotates them"
        return maps.unsupported(self.module)

    def sizes(self) -> dict[str, Any]:
        heads, head_dim = self.module.num_heads, width(self.module)
        dim = heads * head_dim
        return {"dim": dim, "num_heads": heads, "head_dim": head_dim, "prefix": self.prefix}

    def add(self, spec: Spec | None, *, backend: str, native: str) -> None:
        super().add(spec, backend=backend, native=native)
        if native == "replace":
            freeze(self.module, _BIASES)


class LocatedSite(TimmSite):
    """A module in the user's own model, which sets positions by ``located``."""

    axes = None

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        self.prefix = located_prefix()


class RowSite(TimmSite):
    """A module of a model whose tokens form one sequence."""

    def __init__(self, name: str, module: nn.Module, row: Row) -> None:
        super().__init__(name, module)
        self.row, self.prefix = row, row.prefix
        self.drop = getattr(row.model, "patch_drop", None)

    def unsupported(self, spec: Spec) -> str | None:
        embed = self.row.embed
        if self.row.read is patches.read_embedding and not hasattr(embed, "dynamic_feat_size"):
            return (
                f"the grid of its patch embedding {type(embed).__name__} is not known: add a "
                "method dynamic_feat_size(img_size) that returns (rows, columns) to that class"
            )
        return super().unsupported(spec) or patches.unsupported_dropout(self.drop)

    def native(self) -> str | None:
        model = self.row.model
        if getattr(model, "rope", None) is not None:
            return "rotary embedding"
        shared = any(getattr(model, name, None) is not None for name in _SHARED)
        return "relative bias" if shared else super().native()

    def add(self, spec: Spec | None, *, backend: str, native: str) -> None:
        super().add(spec, backend=backend, native=native)
        row = self.row
        slot = carry_geometry(row.model, row.embed, self.module, row.prefix, row.read)
        patches.narrow(self.drop, slot)
        every = {m.__dict__.get("rpe_native") for m in row.modules()}
        if every == {"replace"}:
            freeze(row.model, _SHARED)
        shared = self._shared()
        if every == {"fuse"} and shared is not None:
            change_class(shared, biases.SHARED[type(shared)])

    def _shared(self) -> Any:
        """Return the module whose relative bias the model passes to all its blocks, or None."""
        found = (getattr(self.row.model, name, None) for name in _SHARED)
        return next((x for x in found if x is not None and plain_class(x) in biases.SHARED), None)

    def remove(self) -> None:
        super().remove()
        unfreeze(self.row.model)
        shared = self._shared()
        if shared is not None:
            restore_class(shared)
        if stop_carrying(self.row.model, self.module):
            patches.restore_dropout(self.drop)
