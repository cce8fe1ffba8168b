"""Pictures of benchmarks/ablation.py, told apart by marker and dash and not by colour alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ablation_tables import Line, Table, accuracies
from measure import student

STYLES = (
    ("black", "o", "-"), ("0.35", "s", "--"), ("#1f5fa8", "D", "-"), ("#1f5fa8", "^", "--"),
    ("#d1761b", "v", "-."), ("#d1761b", "P", ":"), ("0.6", "x", "-"), ("0.35", "<", ":"),
    ("#1f5fa8", ">", ":"), ("#d1761b", "*", "-"),
)  # fmt: skip
Lines = dict[str, list[Line]]


def draw(table: Table, own: Lines, side: int, path: Path) -> None:
    """Draw a table's means with their 95 % intervals; models were trained at ``side``."""
    from matplotlib.figure import Figure

    height = 1.2 + 0.32 * len(own) if table.kind == "rows" else 3.6
    wide = table.kind == "sizes"
    figure = Figure(figsize=(9 if wide else 7, height), layout="constrained", dpi=150)
    panels = figure.subplots(
        1, 1 + wide, squeeze=False, sharey=True, width_ratios=(2, 1)[: 1 + wide]
    )
    for axes in panels.flat:
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if table.kind == "sizes":
        _sizes(*panels.flat, own, side)
    else:
        {"rows": _rows, "buckets": _buckets, "budget": _budget}[table.kind](*panels.flat, own)
    seeds = len(next(iter(own.values())))
    figure.suptitle(f"{table.title}\nmean of {seeds} seeds, 95 % interval", fontsize=9)
    figure.savefig(path)


def _spreads(own: Lines) -> list[tuple[float, float]]:
    return [student([line["accuracy"] for line in lines]) for lines in own.values()]


def _rows(axes: Any, own: Lines) -> None:
    """A row, a line; a dotted one down from where the absolute embedding alone stands."""
    spreads = _spreads(own)
    places = range(len(own))
    axes.errorbar(
        [mean for mean, _ in spreads], places, xerr=[half for _, half in spreads], color="black",
        fmt="o", markersize=5, capsize=3,
    )  # fmt: skip
    if "absolute only" in own:
        base = spreads[list(own).index("absolute only")][0]
        axes.axvline(base, color="0.4", linestyle=":", linewidth=1)
    axes.set_yticks(places, list(own))
    axes.invert_yaxis()
    axes.set_xlabel("accuracy, %")


def _buckets(axes: Any, own: Lines) -> None:
    places = [int(row) for row in own]
    _line(axes, places, _spreads(own), "black", "o", "-", None)
    axes.set_xscale("symlog", base=2, linthresh=8)
    axes.set_xticks(places, list(own))
    axes.set_xticks([], minor=True)
    axes.set_xlabel("buckets (0: absolute embedding only)")
    axes.set_ylabel("accuracy, %")


def _budget(axes: Any, own: Lines) -> None:
    """A line for each model: its rows are called after it and its share of the steps."""
    spreads: dict[str, dict[int, tuple[float, float]]] = {}
    for row, spread in zip(own, _spreads(own), strict=True):
        model, share = row.rsplit(", ", 1)
        spreads.setdefault(model, {})[int(share.removesuffix("%"))] = spread
    for (model, line), style in zip(spreads.items(), STYLES, strict=False):
        _line(axes, list(line), list(line.values()), *style, model)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(line), [f"{share} %" for share in line])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("steps of training")
    axes.set_ylabel("accuracy, %")
    _legend(axes)


def _sizes(squares: Any, rectangles: Any, own: Lines, trained: int) -> None:
    """Squares by their side; rectangles beside them, which are no points of the same line."""
    found = accuracies(own, trained)
    sides = {side: size for size in found for side, other in [size.split("x")] if side == other}
    others = [size for size in found if size not in sides.values()]
    for shift, (row, (colour, marker, dash)) in enumerate(zip(own, STYLES, strict=False)):
        spreads = {size: student(values[row]) for size, values in found.items()}
        heights = [int(side) for side in sides]
        line = [spreads[size] for size in sides.values()]
        _line(squares, heights, line, colour, marker, dash, row)
        places = [place + 0.1 * (shift - 3) for place in range(len(others))]
        _line(rectangles, places, [spreads[size] for size in others], colour, marker, "none", row)
    squares.set_xticks(heights, [f"{side / trained:.2g}x" for side in heights])
    squares.set_xlabel("side of the test canvases over that of training")
    squares.set_ylabel("accuracy, %")
    rectangles.set_xticks(range(len(others)), [size.replace(" ", "\n") for size in others])
    rectangles.set_xlabel("height x width, pixels")
    _legend(rectangles)


def _legend(axes: Any) -> None:
    """Beside the lines: there is no place among them."""
    axes.legend(
        frameon=False, fontsize=8, handlelength=4, loc="center left", bbox_to_anchor=(1, 0.5)
    )


def _line(
    axes: Any, places: Sequence[int], spreads: Sequence[tuple[float, float]],
    colour: str, marker: str, dash: str, label: str | None,
) -> None:  # fmt: skip
    axes.errorbar(
        places, [mean for mean, _ in spreads], yerr=[half for _, half in spreads], color=colour,
        marker=marker, linestyle=dash, markersize=5, capsize=3, label=label,
    )  # fmt: skip
