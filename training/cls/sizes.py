"""One trained model at several image sizes: its accuracy as a table and as a curve."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from training.curves import GRID, HELD, INK, TRAIN
from training.errors import UserError
from training.runfolder import RunFolder

Size = tuple[int, int]


def parse_sizes(text: str) -> list[Size]:
    """Read ``112,160,112x224``: sides of squares, and HEIGHTxWIDTH."""
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*0*([1-9]\d*)(?:x0*([1-9]\d*))?\s*", part)
        if match is None:
            raise UserError(
                f"sizes: {part.strip()!r} in {text!r} is not valid; expected sides of squares and "
                "HEIGHTxWIDTH in pixels, as 112,160,224,112x224"
            )
        height, width = match.groups()
        sizes.append((int(height), int(width or height)))
    return sizes


def check_patches(model: nn.Module, sizes: list[Size]) -> None:
    """Raise for a size that is no whole number of the model's patches."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is None:  # a convolutional network takes any
        return
    for size in sizes:
        if any(side % step for side, step in zip(size, patch, strict=True)):
            sides = zip(size, patch, strict=True)
            near = [max(1, round(side / step)) * step for side, step in sides]
            raise UserError(
                f"sizes: {_name(size)} is no whole number of patches of {_name(patch)} pixels; "
                f"{_name(near)} is"
            )


def measure_sizes(
    sizes: list[Size],
    trained: Size,
    measure: Callable[[Size], dict[str, float]],
    folder: RunFolder | None,
) -> list[dict[str, Any]]:
    """Measure every size, print the table line by line, and leave it and the curve in ``folder``.

    Args:
        trained: the size that the model was trained at. measure: evaluates at a size.
        folder: None on all processes but the main one.

    Returns:
        A record of each size, in the order of ``sizes``.
    """
    records = []
    if folder is not None:
        print(f"{'size':>9}  {'accuracy':>9}  {'top-5':>8}  {'loss':>7}  {'wrong':>12}")
    for size in sizes:
        try:
            figures = measure(size)
        except (AssertionError, ValueError) as error:
            raise UserError(f"sizes: the model does not take {_name(size)}: {error}") from error
        records.append({"height": size[0], "width": size[1], **figures})
        if folder is not None:
            wrong = figures["count"] - round(figures["top1"] * figures["count"])
            share = f"{wrong} of {figures['count']}"
            note = "  (trained)" if size == trained else ""
            print(
                f"{_name(size):>9}  {100 * figures['top1']:7.2f} %  {100 * figures['top5']:6.2f} %"
                f"  {figures['loss']:7.4f}  {share:>12}{note}"
            )
    if folder is not None:
        folder.write_json("sizes.json", {"trained": list(trained), "sizes": records})
        draw_sizes(records, trained, folder / "sizes.png", folder.path.name)
        print(f"run folder: {folder.path}")
    return records


def draw_sizes(records: list[dict[str, Any]], trained: Size, path: Path, title: str) -> None:
    """Draw accuracy against the side of the square of as many pixels; rectangles by themselves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained", dpi=150)
    axes = figure.subplots()
    squares = [r for r in records if r["height"] == r["width"]]
    others = [r for r in records if r["height"] != r["width"]]
    for some, style in ((sorted(squares, key=_side), "o-"), (others, "s")):
        if some:
            label = "squares" if style == "o-" else "rectangles, height x width"
            colour = HELD if style == "o-" else "#d1761b"
            top1 = [100 * r["top1"] for r in some]
            axes.plot([*map(_side, some)], top1, style, color=colour, label=label, linewidth=1.8)
    notes = [(_side(r), 100 * r["top1"], f"{100 * r['top1']:.1f}", 7, "bottom") for r in squares]
    for side in {_side(r) for r in others}:  # those of one area share a note
        some = [r for r in others if _side(r) == side]
        low = min(100 * r["top1"] for r in some)
        notes.append((side, low, "\n".join(_name(_size(r)) for r in some), -7, "top"))
    for side, top1, note, away, vertical in notes:
        axes.annotate(
            note,
            (side, top1),
            xytext=(0, away),
            textcoords="offset points",
            ha="center",
            va=vertical,
            fontsize=8,
            color=INK,
        )
    at = math.sqrt(trained[0] * trained[1])
    axes.axvline(at, color=TRAIN, linestyle="--", linewidth=1.2, label=f"trained: {_name(trained)}")
    axes.set_xticks(sorted({_side(r) for r in squares} or {_side(r) for r in others}))
    axes.set_xlabel("side of the image, pixels (rectangles: of the square of their area)")
    axes.set_ylabel("held-out accuracy, %")
    axes.margins(x=0.08, y=0.14)
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    axes.legend(frameon=False)
    axes.set_title(title, fontsize=11, color=INK)
    figure.savefig(path)


def _size(record: dict[str, Any]) -> Size:
    return record["height"], record["width"]


def _side(record: dict[str, Any]) -> float:
    return math.sqrt(record["height"] * record["width"])


def _name(size: Any) -> str:
    return "x".join(map(str, size))
