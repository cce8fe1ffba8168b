"""Pictures of bucket maps."""

from typing import Any

import torch
from torch import Tensor

from ..buckets import bucket_ids
from ..errors import IrpeError
from ..geometry import Grid
from ..spec import Spec, parse_image


def bucket_maps(spec: str | Spec, grid: Grid, at: tuple[int, int]) -> list[Tensor]:
    """Bucket ids of all patches as keys, for the query at a (row, column).

    Returns:
        Maps ``[height, width]``: one, or for method cross two, of rows and of columns.
    """
    row, column = at
    if not (0 <= row < grid.height and 0 <= column < grid.width):
        raise IrpeError(f"there is no patch {at} in a grid of {grid.height}x{grid.width}")
    ids, _ = bucket_ids(spec, Grid(grid.height, grid.width))
    maps = ids if isinstance(ids, tuple) else (ids,)
    query = row * grid.width + column
    return [m[query].view(grid.height, grid.width) for m in maps]


def plot_buckets(spec: str | Spec, grid: Grid, at: tuple[int, int], axes: Any) -> None:
    """Draw a bucket map into matplotlib axes: buckets in use as colours, ids as numbers.

    For method cross, the pairs of row and column bucket are drawn.
    """
    import matplotlib.pyplot as plt

    maps = bucket_maps(spec, grid, at)
    labels = maps[0] if len(maps) == 1 else maps[0] * (int(maps[1].max()) + 1) + maps[1]
    _, colours = torch.unique(labels, return_inverse=True)
    # Neighbouring buckets get colours far apart, so that every border is seen.
    count = int(colours.max()) + 1
    shades = (colours * 0.618033988749895) % 1.0 if count > 1 else colours.float()
    palette = plt.get_cmap("twilight")
    axes.imshow(shades, cmap=palette, vmin=0, vmax=1)
    for y in range(grid.height):
        for x in range(grid.width):
            text = ",".join(str(int(m[y, x])) for m in maps)
            red, green, blue, _ = palette(float(shades[y, x]))
            ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
            axes.text(x, y, text, ha="center", va="center", fontsize=6, color=ink)
    axes.add_patch(plt.Rectangle((at[1] - 0.5, at[0] - 0.5), 1, 1, fill=False, ec="red", lw=2))
    axes.set_xlabel("column of the key's patch")
    axes.set_ylabel("row of the key's patch")
    axes.set_title(f"{parse_image(spec).method}: {count} buckets", fontsize=10)
