"""Pictures of the learned relative position tables."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TERMS = {
    "rpe_q": "term on queries",
    "rpe_k": "term on keys",
    "rpe_v": "term on values",
}


def table_norms(model: nn.Module) -> dict[str, Tensor]:
    """Return, for each kind of table in ``model``, its norm per layer and bucket [layers, N].

    Contextual tables ([H, D, N]; on values [H, N, D]) give the Euclidean norm over D, bias tables
    ([H, N]) the absolute value; both are averaged over heads. Kinds are named ``rpe_k``,
    ``rpe_k.rp_rows`` and so on; layers are in the model's order. Empty for a model without tables.
    """
    layers: dict[str, list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        if kind not in ("lookup_table_weight", "lookup_table_bias"):
            continue
        start = owner.find("rpe_")
        label = owner[start:] if start >= 0 else "table"
        table = parameter.detach().float().cpu()
        if kind == "lookup_table_bias":
            norm = table.abs()
        else:
            norm = table.norm(dim=-1 if "rpe_v" in label else -2)
        layers[label].append(norm.mean(0))
    return {
        label: torch.stack(rows)
        for label, rows in layers.items()
        # A host may give each layer its own spec; unequal tables do not make one picture.
        if len({len(row) for row in rows}) == 1
    }


def draw_tables(model: nn.Module, path: Path, spec: Any) -> bool:
    """Draw the model's tables to ``path``; return False, drawing nothing, if it has none.

    One row of pictures per kind of table. For product buckets each layer becomes a map over row
    and column offsets; for the others, and always at the right, a heatmap of layers by buckets.
    """
    from matplotlib.figure import Figure

    norms = table_norms(model)
    if not norms:
        return False
    sides = {label: _side(table.shape[1], spec) for label, table in norms.items()}
    maps = max((len(norms[label]) for label, side in sides.items() if side), default=0)
    columns = min(maps, 6)
    heights = []
    for label, table in norms.items():
        rows = math.ceil(len(table) / columns) if sides[label] else 0
        heights.append(1.0 + max(2.0 * rows, 0.22 * len(table) + 1.2))
    figure = Figure(figsize=(2.0 * columns + 6.5, sum(heights)), layout="constrained", dpi=130)
    bands = figure.subfigures(len(norms), 1, height_ratios=heights, squeeze=False)[:, 0]
    for band, (label, table) in zip(bands, norms.items(), strict=True):
        band.suptitle(_title(label), fontsize=11)
        side = sides[label]
        top = max(float(table.max()), 1e-12)
        if side:
            parts = band.subfigures(1, 2, width_ratios=[2.0 * columns, 6.0], wspace=0.02)
            _draw_maps(parts[0], table, side, columns, top)
            _draw_heatmap(parts[1], table, top)
        else:
            _draw_heatmap(band, table, top)
    figure.savefig(path)
    return True


def _side(buckets: int, spec: Any) -> int:
    """Return the side of the square of offsets a product table holds, or 0 for other tables."""
    if "product" not in str(spec):
        return 0
    for count in (buckets, buckets - 1):  # the last bucket is that of prefix tokens
        side = math.isqrt(count)
        if side * side == count and side % 2:
            return side
    return 0


def _title(label: str) -> str:
    head, _, rest = label.partition(".")
    title = f"{TERMS.get(head, head)} ({head})"
    return title + {"rp_rows": ", rows", "rp_cols": ", columns"}.get(rest, "")


def _draw_maps(part: Any, table: Tensor, side: int, columns: int, top: float) -> None:
    rows = math.ceil(len(table) / columns)
    grid = part.subplots(rows, columns, squeeze=False)
    half = side // 2
    for index, axes in enumerate(grid.flat):
        if index >= len(table):
            axes.set_axis_off()
            continue
        square = table[index, : side * side].reshape(side, side)
        extent = (-half - 0.5, half + 0.5, half + 0.5, -half - 0.5)
        axes.imshow(square, cmap="viridis", vmin=0, vmax=top, extent=extent)
        axes.set_title(f"layer {index + 1}", fontsize=9)
        axes.set_xticks([-half, 0, half])
        axes.set_yticks([-half, 0, half])
        axes.tick_params(labelsize=7, length=2)
    part.supxlabel("column bucket (0: same column)", fontsize=8)
    part.supylabel("row bucket (0: same row)", fontsize=8)


def _draw_heatmap(part: Any, table: Tensor, top: float) -> None:
    axes = part.subplots()
    image = axes.imshow(
        table, cmap="viridis", vmin=0, vmax=top, aspect="auto", interpolation="nearest"
    )
    axes.set_xlabel("bucket", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    step = max(1, len(table) // 12)
    axes.set_yticks(range(0, len(table), step), [str(i + 1) for i in range(0, len(table), step)])
    axes.tick_params(labelsize=7, length=2)
    bar = part.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label("norm of the table's entry, mean over heads", fontsize=8)
    bar.ax.tick_params(labelsize=7)
