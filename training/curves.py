"""Curves of a run, drawn from its metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

INK, GRID = "#222222", "#dddddd"
TRAIN, HELD, EMA = "#9aa5b1", "#1f5fa8", "#d1761b"


def draw_curves(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw loss and accuracy against epochs from records of :class:`training.loop.Loop`."""
    from matplotlib.figure import Figure

    epochs = [record["epoch"] for record in records]
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2)
    series = [("train_{}", "training (augmented)", TRAIN), ("{}", "held out", HELD)]
    series.append(("ema_{}", "held out, averaged weights", EMA))
    for axes, name, factor in ((left, "loss", 1.0), (right, "top1", 100.0)):
        for pattern, label, colour in series:
            key = pattern.format(name)
            if key in records[0]:
                values = [factor * _number(record[key]) for record in records]
                marker = "o" if len(records) < 3 else None
                axes.plot(epochs, values, color=colour, label=label, marker=marker, linewidth=1.8)
        axes.set_xlabel("epoch")
        axes.grid(color=GRID, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK)
        axes.margins(x=0.01)
        if len(records) < 10:
            axes.set_xticks(epochs)
    left.set_ylabel("cross entropy")
    left.set_ylim(bottom=0)
    right.set_ylabel("accuracy, %")
    key = "ema_top1" if "ema_top1" in records[0] else "top1"
    last = 100 * _number(records[-1][key])
    right.annotate(
        f"{last:.2f} %",
        (epochs[-1], last),
        xytext=(-4, -14),
        textcoords="offset points",
        ha="right",
        va="top",
        color=EMA if key == "ema_top1" else HELD,
    )
    left.legend(frameon=False)
    figure.suptitle(title, fontsize=11, color=INK)
    figure.savefig(path)


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
