"""Draw the attention of one layer: maps by head for one query, and distances by layer."""

from typing import Any

from matplotlib.colors import PowerNorm
from torch import Tensor

from .attention import Layer
from .pictures import COLOURS, colour_bar, figure, mark

_SIDE = 1.35  # inches of a map


def draw_layer(
    layers: list[Layer], number: int, image: Tensor, at: tuple[int, int], title: str
) -> Any:
    """Draw the image, distances by layer, and maps of one layer by head; return the figure.

    Args:
        layers: all layers of the model.
        number: number of the layer to draw, from 1.
        image: ``[height, width, 3]`` in [0, 1].
        at: (row, column) of the query.
        title: title of the figure.
    """
    layer = layers[number - 1]
    heads, height, width = layer.attention.shape
    columns = min(heads, 6)
    lines = -(-heads // columns)
    root, linear = 0.5, 1.0  # colour scales
    bands = [
        ("attention of the query to each patch", layer.attention, root, "probability (root scale)")
    ]
    if layer.position is not None and layer.position.any():
        bands.append(("bias of the encoding", layer.position, linear, "added to the logit"))
    elif layer.position is not None:  # no map of zeros
        title += f"\nthe encoding of layer {number} adds 0 to each logit: its table is untrained"
    tall = lines * (_SIDE * height / width + 0.3) + 0.6
    made = figure(max(8.0, columns * (_SIDE + 0.1) + 1.2), 3.4 + tall * len(bands))
    made.suptitle(title, fontsize=10)
    top, *parts = made.subfigures(1 + len(bands), 1, height_ratios=[3.0] + [tall] * len(bands))
    left, right = top.subplots(1, 2, width_ratios=(1, 1.6))
    _draw_image(left, image, (height, width), at)
    _draw_distances(right, layers, number)
    for part, (what, maps, power, label) in zip(parts, bands, strict=True):
        part.suptitle(f"layer {number}: {what}, by head", fontsize=9)
        least, most = float(maps.min()), float(maps.max())
        norm = PowerNorm(power, least, most if most > least else least + 1.0)
        grid = part.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[heads:]:
            axes.set_axis_off()
        for head, axes in enumerate(grid.flat[:heads]):
            drawn = axes.imshow(maps[head].numpy(), cmap=COLOURS, norm=norm)
            mark(axes, at, thick=0.5)
            axes.locator_params(integer=True, nbins=5)
            axes.set_title(f"head {head + 1}", fontsize=8)
            axes.tick_params(labelsize=7, length=2)
        part.supxlabel("column of the key, patches", fontsize=8)
        part.supylabel("row of the key, patches", fontsize=8)
        colour_bar(part, drawn, grid, label)
    return made


def _draw_image(axes: Any, image: Tensor, grid: tuple[int, int], at: tuple[int, int]) -> None:
    height, width = grid
    axes.imshow(image.numpy(), extent=(-0.5, width - 0.5, height - 0.5, -0.5), aspect="auto")
    axes.set_box_aspect(image.shape[0] / image.shape[1])
    mark(axes, at, thick=0.8)
    axes.locator_params(integer=True)
    axes.set_title(f"the image, and the query at {at[0]},{at[1]}", fontsize=9)
    axes.set_xlabel("column, patches", fontsize=8)
    axes.set_ylabel("row, patches", fontsize=8)
    axes.tick_params(labelsize=7)


def _draw_distances(axes: Any, layers: list[Layer], number: int) -> None:
    numbers = list(range(1, len(layers) + 1))
    for n, layer in zip(numbers, layers, strict=True):
        distances = layer.distances.tolist()
        axes.plot([n] * len(distances), distances, "o", ms=3, color="0.55")
    means = [float(layer.distances.mean()) for layer in layers]
    axes.plot(numbers, means, "-", color="black", label="mean over heads (dots)")
    axes.axvline(number, color="red", lw=1, ls="--", label=f"layer {number}, drawn below")
    axes.set_title("mean distance between query and key", fontsize=9)
    axes.set_xlabel("layer", fontsize=8)
    axes.set_ylabel("distance, patches", fontsize=8)
    axes.set_xticks(numbers[:: 1 + len(numbers) // 16])
    axes.set_ylim(0, 1.15 * max(float(layer.distances.max()) for layer in layers) or None)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7)
