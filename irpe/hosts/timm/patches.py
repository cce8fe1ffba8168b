"""Which patches there are: the grid of timm's patch embeddings, and what patch dropout keeps."""

from typing import Any

from timm.layers.patch_dropout import PatchDropout, PatchDropoutWithIndices, patch_dropout_forward
from torch import Tensor, nn

from ...geometry import Geometry, Grid
from ..carry import Slot, select_by


def read_embedding(
    embed: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, prefix: int
) -> Geometry:
    """The grid of a patch embedding's output, or the positions that were passed to it."""
    if isinstance(output, tuple):  # NaFlexEmbeds: tokens, and their grid if they are a grid
        output, grid = output
        positions = kwargs.get("patch_coord")
        if positions is not None:
            return Geometry(positions, prefix=prefix)
        height, width = grid
    elif output.dim() == 4:
        height, width = output.shape[1:3]
    else:
        height, width = embed.dynamic_feat_size(tuple(args[0].shape[-2:]))
    return Grid(height, width, prefix)


def read_patches(
    embed: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
    prefix: int,
    patch: tuple[int, int] = (1, 1),
) -> Geometry:
    """The grid of a map ``[B, C, height, width]`` that is cut into patches of a size."""
    output = output[0] if isinstance(output, tuple) else output  # PiT: class tokens beside it
    height, width = (-(-n // p) for n, p in zip(output.shape[2:], patch, strict=True))
    return Grid(height, width, prefix)


class SelectingPatchDropout(PatchDropout):
    """timm's PatchDropout, which returns no indices; this one stores the kept patches."""

    def forward(self, x: Tensor) -> Tensor:
        x, kept = patch_dropout_forward(
            x, self.prob, self.num_prefix_tokens, self.ordered, self.training
        )
        slot: Slot = self.__dict__["rpe_select"]
        slot.select(kept)
        return x


def narrow(drop: nn.Module | None, slot: Slot) -> None:
    """Let a model's patch dropout narrow its geometry."""
    if isinstance(drop, PatchDropoutWithIndices):
        select_by(drop, slot.select_returned)
    elif type(drop) is PatchDropout:
        drop.__class__ = SelectingPatchDropout
        drop.__dict__["rpe_select"] = slot


def restore_dropout(drop: nn.Module | None) -> None:
    """Undo ``narrow`` of a plain one; ``stop_carrying`` removes hooks."""
    if isinstance(drop, SelectingPatchDropout):
        drop.__class__ = PatchDropout
        del drop.__dict__["rpe_select"]


def unsupported_dropout(drop: nn.Module | None) -> str | None:
    """Return why the positions of the patches that a model keeps are not known, or None."""
    known = (nn.Identity, PatchDropout, PatchDropoutWithIndices, SelectingPatchDropout)
    if drop is None or type(drop) in known:
        return None
    return f"{type(drop).__name__} does not return which patches it keeps"
