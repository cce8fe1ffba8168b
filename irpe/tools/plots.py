"""Pictures of bucket maps: of images around one patch, of texts by offset."""

from typing import Any

import torch
from torch import Tensor

from ..buckets import bucket_ids
from ..errors import IrpeError
from ..geometry import Geometry, Grid, Sequence
from ..spec import Spec, parse, parse_image
from .pictures import COLOURS, colour_bar, mark

_NUMBERED = 32  # patches on a side


def bucket_maps(spec: str | Spec, grid: Grid, at: tuple[int, int]) -> list[Tensor]:
    """Bucket ids of all patches as keys, for the query at a (row, column).

    Returns:
        Maps ``[height, width]``: one, or for method cross two, of rows and of columns.
    """
    row, column = at
    if not (0 <= row < grid.height and 0 <= column < grid.width):
        raise IrpeError(f"there is no patch {at} in a grid of {grid.height}x{grid.width}")
    keys, _ = Grid(grid.height, grid.width).positions(torch.device("cpu"))
    ids, _ = bucket_ids(spec, Geometry(torch.tensor([at]), keys))
    maps = ids if isinstance(ids, tuple) else (ids,)
    return [m.view(grid.height, grid.width) for m in maps]


def bucket_row(spec: str | Spec, length: int, at: int) -> Tensor:
    """Bucket ids int64 ``[length]`` of all tokens of a text as keys, for the query at a place."""
    if not 0 <= at < length:
        raise IrpeError(f"there is no token {at} in a text of {length} tokens")
    keys = torch.arange(length)
    ids, _ = bucket_ids(spec, Sequence(1, positions=torch.tensor([at]), keys=keys))
    assert isinstance(ids, Tensor)
    return ids[0]


def plot_buckets(spec: str | Spec, grid: Grid, at: tuple[int, int], axes: Any) -> None:
    """Draw a bucket map into matplotlib axes: buckets in use as colours, ids as numbers.

    For method cross, the pairs of row and column bucket are drawn. Lines stand where one bucket
    ends and another begins, which colours alone do not show in grey. Grids too large for numbers
    get a colour bar instead.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    maps = bucket_maps(spec, grid, at)
    labels = maps[0] if len(maps) == 1 else maps[0] * (int(maps[1].max()) + 1) + maps[1]
    buckets = torch.unique(labels, return_inverse=True)[1].numpy()
    count = int(buckets.max()) + 1
    if max(grid.height, grid.width) > _NUMBERED:
        image = axes.imshow(buckets, cmap=COLOURS)
        colour_bar(axes.figure, image, axes, "bucket, counted among those in use")
    else:
        # Neighbouring buckets get colours far apart, all of them light enough for black numbers.
        hues = (torch.arange(count) * 0.618033988749895 % 1.0).numpy()
        light = ListedColormap(colormaps["hsv"](hues) * 0.35 + 0.65)
        axes.imshow(buckets, cmap=light, vmin=-0.5, vmax=count - 0.5)
        for y in range(grid.height):
            for x in range(grid.width):
                text = ",".join(str(int(m[y, x])) for m in maps)
                axes.text(x, y, text, ha="center", va="center", fontsize=6, color="black")
    rows, columns = (buckets[1:] != buckets[:-1]).nonzero()
    axes.hlines(rows + 0.5, columns - 0.5, columns + 0.5, color="black", lw=0.6)
    rows, columns = (buckets[:, 1:] != buckets[:, :-1]).nonzero()
    axes.vlines(columns + 0.5, rows - 0.5, rows + 0.5, color="black", lw=0.6)
    mark(axes, at)
    axes.locator_params(integer=True)
    axes.set_xlabel("column of the key's patch")
    axes.set_ylabel("row of the key's patch")
    axes.set_title(f"{parse_image(spec).method}: {count} buckets", fontsize=10)


def plot_bucket_row(spec: str | Spec, length: int, at: int, axes: Any) -> None:
    """Draw the bucket of each key of a text by its offset, a dot each, into matplotlib axes."""
    row = bucket_row(spec, length, at)
    offsets = torch.arange(length) - at
    axes.plot(offsets.numpy(), row.numpy(), drawstyle="steps-mid", color="0.6", lw=1)
    axes.plot(offsets.numpy(), row.numpy(), "o", ms=3, color="black")
    axes.axvline(0, color="red", lw=1, ls="--")
    axes.text(0.5, row.max(), " the query", va="center", color="red", fontsize=8)
    axes.set_xlabel("position of the key - position of the query, tokens")
    axes.set_ylabel("bucket")
    axes.set_title(f"{parse(spec)}: {row.unique().numel()} buckets", fontsize=10)
