"""How positions travel in models that keep their tokens in one row.

The patch embedding's output tells the grid, anew in each forward pass; the blocks, when they are
gone through, are handed out with that grid bound to them; and each block passes it to its attention
as an argument. So a block that is recomputed in a backward pass (gradient checkpointing) is called
with the grid of its own forward pass, whatever ran in between.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from timm.layers.patch_dropout import (
    PatchDropout,
    PatchDropoutWithIndices,
    patch_dropout_forward,
)
from torch import Tensor, nn

from ...geometry import Geometry, Grid
from ..place import Binds, BoundLayer, Slot
from .core import Equipped, Located


class LocatedBlock(BoundLayer):
    """A block that is handed the geometry as one of its arguments."""

    def __init__(self, block: nn.Module, geometry: Geometry, argument: str) -> None:
        super().__init__(block, geometry)
        self._argument = argument

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        located = Located(self._geometry, kwargs.get(self._argument))
        return self._layer(*args, **{**kwargs, self._argument: located})


class _LocatedBlocks(Binds):
    """A model's blocks; those that hold an equipped attention are bound."""

    argument: str

    def bind(self, layer: nn.Module, geometry: Geometry) -> Any:
        return LocatedBlock(layer, geometry, self.argument) if takes_geometry(layer) else layer


class LocatedSequential(_LocatedBlocks, nn.Sequential):
    pass


class LocatedModuleList(_LocatedBlocks, nn.ModuleList):
    pass


class LocatedPatchDropout(PatchDropout):
    """timm's PatchDropout, which tells the blocks what it keeps."""

    slot: Slot

    def forward(self, x: Tensor) -> Tensor:
        x, kept = patch_dropout_forward(
            x, self.prob, self.num_prefix_tokens, self.ordered, self.training
        )
        self.slot.keep(kept)
        return x


class LocatedPatchDropoutWithIndices(PatchDropoutWithIndices):
    """The one that returns what it keeps."""

    slot: Slot

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x, kept = super().forward(x)
        self.slot.keep(kept)
        return x, kept


class ReadGrid:
    """Forward hook of a patch embedding: the grid of its output, or the places it was told."""

    def __init__(self, slot: Slot, prefix: int) -> None:
        self.slot, self.prefix = slot, prefix

    def __call__(
        self, embed: Any, inputs: tuple[Tensor, ...], given: dict[str, Any], output: Any
    ) -> None:
        if isinstance(output, tuple):  # NaFlexEmbeds: tokens, and their grid if they are a grid
            output, grid = output
            places = given.get("patch_coord")
            if places is not None:
                self.slot.geometry = Geometry(places, prefix=self.prefix)
                return
            height, width = grid
        elif output.dim() == 4:
            height, width = output.shape[1:3]
        else:
            height, width = embed.dynamic_feat_size(tuple(inputs[0].shape[-2:]))
        self.slot.geometry = Grid(height, width, self.prefix)


class ReadMap(ReadGrid):
    """Of a map ``[B, C, height, width]``, or one that is cut into patches of a size."""

    def __init__(self, slot: Slot, prefix: int, patch: tuple[int, int] = (1, 1)) -> None:
        super().__init__(slot, prefix)
        self.patch = patch

    def __call__(
        self, embed: Any, inputs: tuple[Tensor, ...], given: dict[str, Any], output: Any
    ) -> None:
        output = output[0] if isinstance(output, tuple) else output  # PiT: class tokens beside it
        height, width = (-(-n // p) for n, p in zip(output.shape[2:], self.patch, strict=True))
        self.slot.geometry = Grid(height, width, self.prefix)


@dataclass(frozen=True, slots=True)
class Row:
    """A model, or a stage of one, that keeps its tokens in one row.

    Args:
        model: itself. blocks: what positions travel to. embed: whose output tells the grid.
        prefix: tokens before the patches. argument: through which of a block's arguments positions
            travel; None: as its attention says. reader: the hook that reads the grid.
    """

    model: Any
    blocks: Any
    embed: Any
    prefix: int
    argument: str | None = None
    reader: Callable[[Slot, int], ReadGrid] = ReadGrid


_LOCATED: dict[type, type] = {
    nn.Sequential: LocatedSequential,
    nn.ModuleList: LocatedModuleList,
    PatchDropout: LocatedPatchDropout,
    PatchDropoutWithIndices: LocatedPatchDropoutWithIndices,
}


def takes_geometry(block: nn.Module) -> bool:
    return any(isinstance(module, Equipped) for module in block.modules())


def _carriers(row: Row) -> tuple[Any, ...]:
    return row.blocks, getattr(row.model, "patch_drop", None)


def obstacle(row: Row) -> str | None:
    """Why positions cannot travel in a model; None if they can."""
    blocks, drop = map(type, _carriers(row))
    if blocks not in (nn.Sequential, nn.ModuleList, *_LOCATED.values()):
        return f"its blocks are a {blocks.__name__}, not a Sequential"
    if drop not in (type(None), nn.Identity, *_LOCATED, *_LOCATED.values()):
        return f"{drop.__name__} does not tell which patches it keeps"
    return None


def locate(row: Row, argument: str) -> None:
    """Let positions travel from the patch embedding to the blocks."""
    if isinstance(row.blocks, _LocatedBlocks):
        return
    slot = Slot()
    for module in _carriers(row):
        if type(module) in _LOCATED:
            module.__class__ = _LOCATED[type(module)]
            module.slot = slot
    row.blocks.argument = row.argument or argument
    row.embed.register_forward_hook(row.reader(slot, row.prefix), with_kwargs=True)


def forget(row: Row) -> None:
    """Undo ``locate``, once no block takes a geometry any more."""
    if any(takes_geometry(block) for block in row.blocks._modules.values()):
        return
    given = row.embed._forward_hooks
    ours = [k for k, h in given.items() if isinstance(h, ReadGrid) and h.slot is row.blocks.slot]
    for key in ours:
        del given[key], row.embed._forward_hooks_with_kwargs[key]
    back = {located: plain for plain, located in _LOCATED.items()}
    for module in _carriers(row):
        if type(module) in back:
            module.__class__ = back[type(module)]
            del module.slot
    del row.blocks.argument
