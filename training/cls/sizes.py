"""Evaluate a model at several image sizes, with a table and a curve of its accuracy."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from irpe.tools.pictures import figure
from training.errors import UserError
from training.report import EMA, HELD, INK, TRAIN, style
from training.run_directory import RunDirectory

Size = tuple[int, int]


def parse_sizes(text: str) -> list[Size]:
    """Parse ``112,160,112x224``: sides of squares, or HEIGHTxWIDTH."""
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*0*([1-9]\d*)(?:x0*([1-9]\d*))?\s*", part)
        if match is None:
            raise UserError(
                f"sizes: {part.strip()!r} in {text!r} is not valid; expected sides of squares or "
                "HEIGHTxWIDTH in pixels, as 112,160,224,112x224"
            )
        height, width = match.groups()
        sizes.append((int(height), int(width or height)))
    return sizes


def check_patches(model: nn.Module, sizes: list[Size]) -> None:
    """Raise if a size is not a multiple of the patch size."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is None:  # convolutional networks take any size
        return
    for size in sizes:
        if any(side % step for side, step in zip(size, patch, strict=True)):
            sides = zip(size, patch, strict=True)
            near = [max(1, round(side / step)) * step for side, step in sides]
            raise UserError(
                f"sizes: {_name(size)} is not a multiple of the patch size {_name(patch)}; "
                f"{_name(near)} is"
            )


def measure_sizes(
    sizes: list[Size],
    trained: Size,
    measure: Callable[[Size], dict[str, float]],
    directory: RunDirectory | None,
) -> list[dict[str, Any]]:
    """Evaluate at every size, print a table, and write it and a curve into the run directory.

    Args:
        sizes: (height, width) of the images, in pixels.
        measure: returns the metrics at a size.
        directory: the run directory; None except on the main process.

    Returns:
        A record of each size, in the order of ``sizes``.
    """
    records = []
    if directory is not None:
        print(f"{'size':>9}  {'accuracy':>9}  {'top-5':>8}  {'loss':>7}  {'wrong':>12}")
    for size in sizes:
        try:
            metrics = measure(size)
        except (AssertionError, ValueError) as error:
            raise UserError(f"sizes: the model does not take {_name(size)}: {error}") from error
        records.append({"height": size[0], "width": size[1], **metrics})
        if directory is not None:
            wrong = metrics["count"] - round(metrics["top1"] * metrics["count"])
            share = f"{wrong} of {metrics['count']}"
            note = "  (trained)" if size == trained else ""
            print(
                f"{_name(size):>9}  {100 * metrics['top1']:7.2f} %  {100 * metrics['top5']:6.2f} %"
                f"  {metrics['loss']:7.4f}  {share:>12}{note}"
            )
    if directory is not None:
        directory.write_json("sizes.json", {"trained": list(trained), "sizes": records})
        draw_sizes(records, trained, directory / "sizes.png", directory.path.name)
        print(f"run directory: {directory.path}")
    return records


def draw_sizes(records: list[dict[str, Any]], trained: Size, path: Path, title: str) -> None:
    """Draw accuracy against the square root of the image area; rectangles are single points."""
    from matplotlib.patheffects import withStroke

    made = figure(6.4, 4.7)
    axes, ticks = made.subplots(), set()
    for square, form, colour, label in (
        (True, "o-", HELD, "squares"),
        (False, "s", EMA, "rectangles, height x width"),
    ):
        by_side: dict[float, list[tuple[float, str]]] = {}
        for record in records:
            height, width, top1 = record["height"], record["width"], 100 * record["top1"]
            if (height == width) == square:
                note = f"{top1:.1f}" if square else f"{height}x{width}"
                by_side.setdefault(math.sqrt(height * width), []).append((top1, note))
        points = [(side, top1) for side in sorted(by_side) for top1, _ in by_side[side]]
        if points:
            axes.plot(*zip(*points, strict=True), form, color=colour, label=label, linewidth=1.8)
            ticks = ticks or set(by_side)
        for side, own in by_side.items():  # points of one area share a note
            text = axes.annotate(
                "\n".join(note for _, note in own), (side, min(own)[0]), (0, 7 if square else -7),
                va="bottom" if square else "top", ha="center", textcoords="offset points",
                fontsize=8, color=INK, zorder=4,
            )  # fmt: skip
            text.set_path_effects([withStroke(linewidth=3, foreground="white")])  # over lines
    at = math.sqrt(trained[0] * trained[1])
    name = f"trained: {trained[0]}x{trained[1]}"
    axes.axvline(at, color=TRAIN, linestyle="--", linewidth=1.2, label=name)
    axes.set_xticks(sorted(ticks))
    axes.set_xlabel("side of the image, pixels (rectangles: of the square of their area)")
    axes.set_ylabel("held-out accuracy, %")
    axes.margins(x=0.08, y=0.14)
    style(axes)
    made.legend(frameon=False, fontsize=9, ncols=3, loc="outside lower center")
    axes.set_title(title, fontsize=11, color=INK)
    made.savefig(path)


def _name(size: Any) -> str:
    return "x".join(map(str, size))
