"""Reports of a run: curves of metrics, pictures of tables, experiment trackers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers, get_available_trackers
from accelerate.utils import LoggerType
from torch import Tensor, nn

from irpe import RPE
from irpe.tools import tables as tools
from irpe.tools.pictures import figure
from irpe.tools.tables import read_tables, trained_grid
from training.errors import UserError

INK, GRID = "#222222", "#dddddd"
TRAIN, HELD, EMA = "#9aa5b1", "#1f5fa8", "#d1761b"
SERIES = (
    ("train_{}", "training", TRAIN),
    ("{}", "held out", HELD),
    ("ema_{}", "held out, averaged weights", EMA),
)
TERMS = ("rpe_q", "rpe_k", "rpe_v")
_GRID = (14, 14)  # default grid of tables
# Metrics that are fractions.
SHARES = {
    form.format(name)
    for name in ("top1", "top5", "both_ends", "exact", "f1", "AP", "AP50")
    for form, _, _ in SERIES
}


# Metrics to draw against epochs, with the labels of their axes.
Panels = Mapping[str, str]
CLASSIFIER = {"loss": "cross entropy", "top1": "accuracy, %"}
LANGUAGE = {"loss": "cross entropy, nats per token", "bits_per_byte": "bits per byte"}
ANSWERS = {"loss": "cross entropy of both ends", "f1": "F1, %", "exact": "exact match, %"}
DETECTOR = {
    "loss": "loss, weighted sum",
    "loss_ce": "cross entropy of classes",
    "loss_bbox": "L1 loss of boxes",
    "loss_giou": "generalized IoU loss of boxes",
    "AP": "AP, %",
    "AP50": "AP at IoU 0.5, %",
}


def draw_curves(records: list[dict[str, Any]], path: Path, title: str, panels: Panels) -> None:
    """Draw the metrics in ``records`` of :class:`training.loop.Loop` against epochs.

    Each panel has the metric in training, held out, and of averaged weights. Fractions are in
    percent, axes of losses start at 0. Panels without any value are omitted.
    """
    names = {name for record in records for name in record}
    panels = {p: x for p, x in panels.items() if names & {form.format(p) for form, _, _ in SERIES}}
    columns = min(len(panels), 2 if len(panels) < 5 else 3)
    rows = math.ceil(len(panels) / columns)
    made = figure(5 * columns, 4 * rows)
    grid = made.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (name, label) in zip(grid, panels.items(), strict=False):
        _draw_panel(axes, name, label, records)
    # Series differ between panels.
    lines = {line.get_label(): line for axes in grid for line in axes.get_lines()}
    known = [lines[label] for _, label, _ in SERIES if label in lines]
    grid[0].legend(handles=known, frameon=False)
    made.suptitle(title, fontsize=11, color=INK)
    made.savefig(path)


def style(axes: Any) -> None:
    """Give axes the grid and colours that all curves share."""
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def _draw_panel(axes: Any, name: str, title: str, records: list[dict[str, Any]]) -> None:
    last = None
    for form, label, colour in SERIES:
        key = form.format(name)
        there = [record for record in records if key in record]
        if not there:
            continue
        epochs = [record["epoch"] for record in there]
        # Records have null for values that are not finite.
        values = [math.nan if record[key] is None else float(record[key]) for record in there]
        values = [100 * value if name in SHARES else value for value in values]
        marker = "o" if len(there) < 3 else None
        axes.plot(epochs, values, color=colour, label=label, marker=marker, linewidth=1.8)
        last = epochs[-1], values[-1], colour
    style(axes)
    axes.set_xlabel("epoch")
    axes.margins(x=0.01, y=0.12)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(records) < 10:
        axes.set_xticks([record["epoch"] for record in records])
    axes.set_ylabel(title)
    if name not in SHARES:
        axes.set_ylim(bottom=0)
    elif last is not None:
        epoch, value, colour = last
        place = {"xytext": (0, 5), "textcoords": "offset points", "ha": "right"}
        axes.annotate(f"{value:.2f} %", (epoch, value), color=colour, **place)


def draw_tables(model: nn.Module, path: Path) -> bool:
    """Draw the model's tables to ``path`` as ``irpe tables`` does; return False if it has none.

    Zeros are grey: training did not use these buckets.
    """
    found: dict[RPE, dict[str, Tensor]] = defaultdict(dict)
    for name, module in model.named_modules():
        spec = getattr(module, "spec", None)
        if isinstance(spec, RPE) and name.rpartition(".")[2] in TERMS:
            values = module.state_dict(prefix=f"{name}.").items()
            found[spec] |= {key: value for key, value in values if "lookup_table_" in key}
    if not found:
        return False
    grid = trained_grid(model.state_dict()) or _GRID
    tables = [kind for spec, own in found.items() for kind in read_tables(own, spec, grid)]
    made = tools.draw_tables(tables, f"{path.parent.name} (grey: never used)")
    made.savefig(path)
    return True


def check_trackers(names: Sequence[str]) -> None:
    """Raise :class:`UserError` for trackers that accelerate does not have or cannot import."""
    there = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(
                f"run.trackers: {name!r} is unknown; valid: {', '.join(LOGGER_TYPE_TO_CLASS)}"
            )
        if name in LoggerType.list() and name not in there:  # plugins register others
            raise UserError(f"run.trackers: {name!r} needs the package {name}; pip install {name}")


def start_trackers(
    accelerator: Accelerator, names: Sequence[str], folder: Path, config: dict[str, Any]
) -> None:
    """Start trackers that write into the run directory ``folder``, on the main process.

    Args:
        folder: the run directory.
        config: options by dotted names; values that are not numbers are stored as text.
    """
    accelerator.log_with = filter_trackers(names, str(folder))
    accelerator.project_configuration.set_directories(str(folder))
    plain = {key: x if isinstance(x, bool | int | float) else str(x) for key, x in config.items()}
    wandb = {"dir": str(folder), "name": folder.name}
    accelerator.init_trackers("irpe", config=plain, init_kwargs={"wandb": wandb})
