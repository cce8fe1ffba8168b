"""Pictures of the learned relative position tables."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

COLOURS, NEVER = "viridis", "#d9d9d9"
TERMS = {
    "rpe_q": "term on queries",
    "rpe_k": "term on keys",
    "rpe_v": "term on values",
}


@dataclass
class Norms:
    """Norms of one kind of table: the layers' numbers, counted from 1, and values [layers, N]."""

    layers: list[int]
    values: Tensor


def table_norms(model: nn.Module) -> dict[str, Norms]:
    """Return, for each kind of table in ``model``, its norm per layer and bucket.

    Contextual tables ([H, D, N]; on values [H, N, D]) give the Euclidean norm over D, bias tables
    ([H, N]) the absolute value; both are averaged over heads. Kinds are named ``rpe_k``,
    ``rpe_k.rp_rows`` and so on. Empty for a model without tables.
    """
    found: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
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
            norm = table.norm(dim=-1 if label.startswith("rpe_v") else -2)
        # blocks.7.attn is layer 8, also where the layers before it carry no table.
        numbers = [int(part) for part in owner.split(".") if part.isdecimal()]
        layer = numbers[-1] + 1 if numbers else len(found[label]) + 1
        found[label].append((layer, norm.mean(0)))
    return {
        label: Norms([layer for layer, _ in rows], torch.stack([row for _, row in rows]))
        for label, rows in found.items()
        # Layers may have specs of their own; unequal tables do not make one picture.
        if len({len(row) for _, row in rows}) == 1
    }


def draw_tables(model: nn.Module, path: Path, spec: Any) -> bool:
    """Draw the model's tables to ``path``; return False, drawing nothing, if it has none.

    One band of pictures per kind of table: a heatmap of layers by buckets, and for product buckets,
    at its left, a map over row and column offsets for each layer. Entries that are zero in every
    layer are grey: no pair of patches of the training grid met in that bucket.
    """
    from matplotlib.figure import Figure

    norms = table_norms(model)
    if not norms:
        return False
    sides = {label: _side(norm.values.shape[1], spec) for label, norm in norms.items()}
    columns = min(max((len(norms[label].layers) for label in norms if sides[label]), default=0), 4)
    heights = []
    for label, norm in norms.items():
        rows = math.ceil(len(norm.layers) / columns) if sides[label] else 0
        heights.append(max(1.3 + 1.75 * rows, 1.8 + 0.2 * len(norm.layers)))
    widths = [1.75 * columns + 0.5, 6.5] if columns else [0.0, 9.0]
    figure = Figure(figsize=(sum(widths), sum(heights)), layout="constrained", dpi=150)
    bands = figure.subfigures(len(norms), 1, height_ratios=heights, squeeze=False)[:, 0]
    for band, (label, norm) in zip(bands, norms.items(), strict=True):
        band.suptitle(_title(label), fontsize=11)
        table, layers = norm.values, norm.layers
        met = (table > 0).any(0)
        shown = np.ma.masked_array(table.numpy(), np.broadcast_to(~met.numpy(), table.shape))
        top = max(float(table.max()), 1e-12)
        if sides[label]:
            left, right = band.subfigures(1, 2, width_ratios=widths, wspace=0.03)
            _draw_maps(left, shown, layers, sides[label], columns, top)
            _draw_heatmap(right, shown, layers, top)
        else:
            _draw_heatmap(band, shown, layers, top)
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


def _draw_maps(
    part: Any, table: np.ma.MaskedArray, layers: list[int], side: int, columns: int, top: float
) -> None:
    """Draw a square map per layer from ``table`` [layers, N], as far out as buckets were met."""
    squares = table[:, : side * side].reshape(-1, side, side)
    half = side // 2
    met = np.argwhere(~np.ma.getmaskarray(squares)[0]) - half
    reach = int(np.abs(met).max()) if len(met) else half
    squares = squares[:, half - reach : half + reach + 1, half - reach : half + reach + 1]
    grid = part.subplots(math.ceil(len(table) / columns), columns, squeeze=False)
    edge = reach + 0.5
    for index, axes in enumerate(grid.flat):
        if index >= len(table):
            axes.set_axis_off()
            continue
        extent = (-edge, edge, edge, -edge)
        axes.imshow(squares[index], cmap=COLOURS, vmin=0, vmax=top, extent=extent)
        axes.set_facecolor(NEVER)
        axes.set_title(f"layer {layers[index]}", fontsize=9)
        axes.set_xticks([-reach, 0, reach])
        axes.set_yticks([-reach, 0, reach])
        axes.tick_params(labelsize=7, length=2)
    part.supxlabel("bucket of the column offset (0: same column)", fontsize=8)
    part.supylabel("bucket of the row offset (0: same row)", fontsize=8)


def _draw_heatmap(part: Any, table: np.ma.MaskedArray, layers: list[int], top: float) -> None:
    """Draw ``table`` [layers, N] with its colour bar."""
    axes = part.subplots()
    image = axes.imshow(
        table, cmap=COLOURS, vmin=0, vmax=top, aspect="auto", interpolation="nearest"
    )
    axes.set_facecolor(NEVER)
    title = "all buckets"
    if np.ma.getmaskarray(table).any():
        title += " (grey: never met on this grid)"
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("bucket", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    step = max(1, len(table) // 12)
    axes.set_yticks(range(0, len(table), step), list(map(str, layers[::step])))
    axes.tick_params(labelsize=7, length=2)
    bar = part.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label("norm of an entry, mean over heads", fontsize=8)
    bar.ax.tick_params(labelsize=7)
