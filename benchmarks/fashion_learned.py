"""What models of benchmarks/fashion.py learned: tables over offsets, distances of attention."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ablation_pictures import STYLES
from ablation_tables import Cell, Line
from torch import Tensor, nn

from irpe import Grid
from irpe.tools.attention import watch
from irpe.tools.tables import Tables, draw_tables, read_tables

IMAGES = 16  # test images that distances are a mean over
TEXT = """## What the models learned

Of seed 0. *Mean distance of attention*: over the keys by their probability, over all queries, heads
and {images} test images, in patches; a query that attends alike to all patches has {uniform:.2f}.
*Tables*: the norm of each bucket's vector, by the offset of the key from the query, for the two
models with relative tables and no other position."""
MAPS = {"k": ("rpe_k",), "qkv": ("rpe_q", "rpe_k", "rpe_v")}


def learned(model: nn.Module, cell: Cell, images: Tensor, grid: Grid) -> dict[str, Any]:
    """Return mean distances of attention by layer, and tables by kind and layer.

    Args:
        model: trained, in evaluation mode.
        cell: what it was built from.
        images: ``[N, 1, height, width]``.
        grid: its patches.
    """
    seen = [watch(model, image[None], grid, (0, 0)) for image in images[:IMAGES]]
    by_layer = [[float(layer.distances.mean()) for layer in layers] for layers in seen]
    means = torch.tensor(by_layer).mean(0)
    found = {"distances": [round(x, 3) for x in means.tolist()]}
    specs = [part for part in (cell.encoding or "").split(" + ") if part.startswith("rpe-")]
    size = (grid.height, grid.width)
    tables = [kind for spec in specs for kind in read_tables(model.state_dict(), spec, size)]
    if tables:
        found["tables"] = {
            kind.kind: [[round(x, 3) for x in value.flatten().tolist()] for value in kind.values]
            for kind in tables
        }
    return found


def report(
    lines: Sequence[Line], rows: dict[str, Cell], grid: Grid, out: Path, name: str
) -> list[str]:
    """Return the section of the page, and draw its pictures into ``out``."""
    by_cell = {line["cell"]: line["learned"] for line in lines if "learned" in line}
    found = {row: by_cell[cell.key] for row, cell in rows.items() if cell.key in by_cell}
    if not found:
        return []
    offsets = grid.offsets("cpu").float().square().sum(-1).sqrt()
    layers = range(1, len(next(iter(found.values()))["distances"]) + 1)
    table = [f"| mean distance, patches | {' | '.join(f'layer {n}' for n in layers)} |"]
    table.append("|---" * (len(layers) + 1) + "|")
    for row, own in found.items():
        table.append(f"| {row} | {' | '.join(f'{x:.2f}' for x in own['distances'])} |")
    parts = [TEXT.format(images=IMAGES, uniform=float(offsets.mean())), "\n".join(table)]
    _draw({row: own["distances"] for row, own in found.items()}, out / f"{name}_distances.png")
    parts.append(f"![Mean distances of attention]({name}_distances.png)")
    for row, kinds in MAPS.items():
        if row not in found:
            continue
        shape = (-1, 2 * grid.height - 1, 2 * grid.width - 1)
        tables = [
            Tables(
                kind,
                list(layers),
                [torch.tensor(value).view(shape) for value in found[row]["tables"][kind]],
                "norm of the bucket's vector",
            )
            for kind in kinds
        ]
        picture = f"{name}_tables_{row}.png"
        draw_tables(tables, f"Tables of {row}, seed 0").savefig(out / picture, dpi=110)
        parts.append(f"![Tables of {row}]({picture})")
    return parts


def _draw(distances: dict[str, list[float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained", dpi=150)
    axes = figure.subplots()
    for (row, values), (colour, marker, dash) in zip(distances.items(), STYLES, strict=False):
        places = range(1, len(values) + 1)
        axes.plot(places, values, color=colour, marker=marker, linestyle=dash, label=row)
    axes.set_xticks(places)
    axes.set_xlabel("layer")
    axes.set_ylabel("mean distance of attention, patches")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)
