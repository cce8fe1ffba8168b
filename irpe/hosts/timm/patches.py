"""The grid of timm's patch embeddings, and the patches that patch dropout keeps."""

from typing import Any

from timm.layers.patch_dropout import PatchDropout, PatchDropoutWithIndices, patch_dropout_forward
from torch import Tensor, nn

from ...geometry import Geometry, Grid
from ..carry import Slot, select_by


def read_embedding(
    embed: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, prefix: int
) -> Geometry:
    """Return the grid of a patch embedding's output, or the positions that were passed to it."""
    if isinstance(output, tuple):  # NaFlexEmbeds: (tokens, grid)
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
    """Return the grid of a map ``[B, C, height, width]``, split into patches of a size."""
    output = output[0] if isinstance(output, tuple) else output  # PiT: (map, class tokens)
    height, width = (-(-n // p) for n, p in zip(output.shape[2:], patch, strict=True))
    return Grid(height, width, prefix)


class SelectingPatchDropout(PatchDropout):
    """timm's PatchDropout, which passes the indices of the kept patches to a slot."""

    def forward(self, x: Tensor) -> Tensor:
        x, kept = patch_dropout_forward(
            x, self.prob, self.num_prefix_tokens, self.ordered, self.training
        )
        slot: Slot = self.__dict__["rpe_select"]
        slot.select(kept)
        return x


def narrow(drop: nn.Module | None, slot: Slot) -> None:
    """Make a model's patch dropout select the kept patches in its slot."""
    if isinstance(drop, PatchDropoutWithIndices):
        select_by(drop, slot.select_returned)
    elif type(drop) is PatchDropout:
        drop.__class__ = SelectingPatchDropout
        drop.__dict__["rpe_select"] = slot


def restore_dropout(drop: nn.Module | None) -> None:
    """Undo ``narrow``'s change of class; ``stop_carrying`` removes its hooks."""
    if isinstance(drop, SelectingPatchDropout):
        drop.__class__ = PatchDropout
        del drop.__dict__["rpe_select"]


def unsupported_dropout(drop: nn.Module | None) -> str | None:
    """Return why the kept patches of a patch dropout cannot be read, or None."""
    known = (nn.Identity, PatchDropout, PatchDropoutWithIndices, SelectingPatchDropout)
    if drop is None or type(drop) in known:
        return None
    return f"{type(drop).__name__} does not return which patches it keeps"
