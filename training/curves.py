"""Curves of a run, drawn from its metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INK, GRID = "#222222", "#dddddd"
TRAIN, HELD, EMA = "#9aa5b1", "#1f5fa8", "#d1761b"
SERIES = (
    ("train_{}", "training", TRAIN),
    ("{}", "held out", HELD),
    ("ema_{}", "held out, averaged weights", EMA),
)


@dataclass(frozen=True)
class Panel:
    """One figure of the records against epochs: in training, held out, and of averaged weights.

    Attributes:
        name: of the figure in a record, which may be prefixed by ``train_`` or ``ema_``.
        label: of the axis. share: a share of 1, shown in percent, the last one written out; other
            figures are losses and start from 0.
    """

    name: str
    label: str
    share: bool = False


CLASSIFIER = (Panel("loss", "cross entropy"), Panel("top1", "accuracy, %", share=True))
LANGUAGE = (
    Panel("loss", "cross entropy, nats per token"),
    Panel("bits_per_byte", "bits per byte"),
)
ANSWERS = (
    Panel("loss", "cross entropy of both ends"),
    Panel("f1", "F1, %", share=True),
    Panel("exact", "exact match, %", share=True),
)
DETECTOR = (
    Panel("loss", "loss, weighted sum"),
    Panel("loss_ce", "cross entropy of classes"),
    Panel("loss_bbox", "L1 loss of boxes"),
    Panel("loss_giou", "generalized IoU loss of boxes"),
    Panel("AP", "AP, %", share=True),
    Panel("AP50", "AP at IoU 0.5, %", share=True),
)


def draw_curves(
    records: list[dict[str, Any]], path: Path, title: str, panels: Sequence[Panel]
) -> None:
    """Draw figures against epochs from records of :class:`training.loop.Loop`.

    Panels of which no record has a figure are left out, and so are points that a record lacks.
    """
    from matplotlib.figure import Figure

    names = {name for record in records for name in record}
    panels = [p for p in panels if any(form.format(p.name) in names for form, _, _ in SERIES)]
    columns = min(len(panels), 2 if len(panels) < 5 else 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5 * columns, 4 * rows), layout="constrained", dpi=150)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for panel, axes in zip(panels, grid, strict=False):
        _draw_panel(axes, panel, records)
    # A panel may lack a series that another has.
    lines = {line.get_label(): line for axes in grid for line in axes.get_lines()}
    known = [lines[label] for _, label, _ in SERIES if label in lines]
    grid[0].legend(handles=known, frameon=False)
    figure.suptitle(title, fontsize=11, color=INK)
    figure.savefig(path)


def _draw_panel(axes: Any, panel: Panel, records: list[dict[str, Any]]) -> None:
    last = None
    for form, label, colour in SERIES:
        key = form.format(panel.name)
        there = [record for record in records if key in record]
        if not there:
            continue
        epochs = [record["epoch"] for record in there]
        values = [(100 if panel.share else 1) * _number(record[key]) for record in there]
        marker = "o" if len(there) < 3 else None
        axes.plot(epochs, values, color=colour, label=label, marker=marker, linewidth=1.8)
        last = epochs[-1], values[-1], colour
    axes.set_xlabel("epoch")
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    axes.margins(x=0.01, y=0.12)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(records) < 10:
        axes.set_xticks([record["epoch"] for record in records])
    axes.set_ylabel(panel.label)
    if not panel.share:
        axes.set_ylim(bottom=0)
    elif last is not None:
        epoch, value, colour = last
        axes.annotate(
            f"{value:.2f} %",
            (epoch, value),
            xytext=(0, 5),
            textcoords="offset points",
            ha="right",
            color=colour,
        )


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
