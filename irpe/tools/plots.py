"""Draw bucket maps: for images around one patch, for texts by offset."""

from typing import Any

import torch
from torch import Tensor

from ..encodings import bucket_ids, parse
from ..errors import IrpeError
from ..geometry import Geometry, Grid, Sequence, Volume
from ..spec import Spec
from .pictures import COLOURS, colour_bar, mark

_NUMBERED = 32  # patches on a side


def bucket_maps(
    spec: str | Spec, grid: Grid | Volume, at: tuple[int, ...], frame: int | None = None
) -> list[Tensor]:
    """Return the bucket ids of all patches as keys, for the query at a (row, column).

    Args:
        spec: the encoding.
        grid: the patches; of a volume, the result has the keys of one frame.
        at: (row, column) of the query; for a volume (frame, row, column).
        frame: frame of the keys; None: the query's.

    Returns:
        Maps ``[height, width]``: one, or for method cross one for each axis.

    Raises:
        IrpeError: if the query or frame is outside the grid.
    """
    if not all(0 <= place < side for place, side in zip(at, grid.sides, strict=True)):
        what = type(grid).__name__.lower()
        raise IrpeError(f"there is no patch {at} in a {what} of {'x'.join(map(str, grid.sides))}")
    keys, _ = type(grid)(*grid.sides).positions(torch.device("cpu"))
    if isinstance(grid, Volume):
        frame = at[0] if frame is None else frame
        if not 0 <= frame < grid.frames:
            raise IrpeError(f"there is no frame {frame} among {grid.frames}")
        keys = keys[keys[:, 0] == frame]
    ids, _ = bucket_ids(spec, Geometry(torch.tensor([at]), keys))
    maps = ids if isinstance(ids, tuple) else (ids,)
    return [m.view(grid.height, grid.width) for m in maps]


def bucket_row(spec: str | Spec, length: int, at: int) -> Tensor:
    """Return the bucket ids of all keys of a text, int64 ``[length]``, for the query at ``at``."""
    if not 0 <= at < length:
        raise IrpeError(f"there is no token {at} in a text of {length} tokens")
    keys = torch.arange(length)
    ids, _ = bucket_ids(spec, Sequence(1, positions=torch.tensor([at]), keys=keys))
    assert isinstance(ids, Tensor)
    return ids[0]


def plot_buckets(
    spec: str | Spec,
    grid: Grid | Volume,
    at: tuple[int, ...],
    axes: Any,
    frame: int | None = None,
) -> None:
    """Draw a bucket map into matplotlib axes, with colours, ids and lines between buckets.

    For method cross, each combination of buckets has a colour, and the ids of the axes are below
    each other. Large grids have a colour bar instead of ids.

    Args:
        spec: see ``bucket_maps``.
        grid: see ``bucket_maps``.
        at: see ``bucket_maps``.
        axes: the matplotlib axes.
        frame: see ``bucket_maps``.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    maps = bucket_maps(spec, grid, at, frame)
    labels = maps[0]
    for part in maps[1:]:
        labels = labels * (int(part.max()) + 1) + part
    buckets = torch.unique(labels, return_inverse=True)[1].numpy()
    count = int(buckets.max()) + 1
    if max(grid.height, grid.width) > _NUMBERED:
        image = axes.imshow(buckets, cmap=COLOURS)
        colour_bar(axes.figure, image, axes, "bucket, numbered among those in use")
    else:
        # Distinct colours for neighbouring buckets, light enough for black numbers.
        hues = (torch.arange(count) * 0.618033988749895 % 1.0).numpy()
        light = ListedColormap(colormaps["hsv"](hues) * 0.35 + 0.65)
        axes.imshow(buckets, cmap=light, vmin=-0.5, vmax=count - 0.5)
        size = 6 if len(maps) == 1 else 5
        for y in range(grid.height):
            for x in range(grid.width):
                text = "\n".join(str(int(m[y, x])) for m in maps)
                axes.text(x, y, text, ha="center", va="center", fontsize=size, color="black")
    rows, columns = (buckets[1:] != buckets[:-1]).nonzero()
    axes.hlines(rows + 0.5, columns - 0.5, columns + 0.5, color="black", lw=0.6)
    rows, columns = (buckets[:, 1:] != buckets[:, :-1]).nonzero()
    axes.vlines(columns + 0.5, rows - 0.5, rows + 0.5, color="black", lw=0.6)
    mark(axes, (at[-2], at[-1]))
    axes.locator_params(integer=True)
    axes.set_xlabel("column of the key's patch")
    axes.set_ylabel("row of the key's patch")
    axes.set_title(f"{parse(spec)}: {count} buckets", fontsize=10)


def plot_bucket_row(spec: str | Spec, length: int, at: int, axes: Any) -> None:
    """Draw the bucket of each key of a text by its offset into matplotlib axes."""
    row = bucket_row(spec, length, at)
    offsets = torch.arange(length) - at
    axes.plot(offsets.numpy(), row.numpy(), drawstyle="steps-mid", color="0.6", lw=1)
    axes.plot(offsets.numpy(), row.numpy(), "o", ms=3, color="black")
    axes.axvline(0, color="red", lw=1, ls="--")
    axes.text(0.5, row.max(), " the query", va="center", color="red", fontsize=8)
    axes.set_xlabel("position of the key - position of the query, tokens")
    axes.set_ylabel("bucket")
    axes.set_title(f"{parse(spec)}: {row.unique().numel()} buckets", fontsize=10)
