"""Pictures of a detector: what it finds beside what is there, and precision against recall."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from training.curves import EMA, GRID, HELD, INK, TRAIN
from training.det.average_precision import PrecisionRecall

# Light ones, that colour-blind people tell apart: names are written on them in black.
COLOURS = ("#77AADD", "#EE8866", "#EEDD88", "#FFAABB", "#99DDFF", "#44BB99", "#BBCC33", "#AAAA00")
COLOURS += ("#DDDDDD", "#CC99FF")
SIDE = 400  # pixels of the longer side of a picture in the sheet, at most
INCHES = 2.7 / SIDE
LINE = 2


@dataclass
class Example:
    """One image with its objects and its detections.

    Attributes:
        name: what to call it. image: ``[3, H, W]``, 0 to 1 (or uint8), without padding; see
            :func:`unnormalized`.
        truth: labels ``[T]`` and boxes ``[T, 4]``. found: scores, labels and boxes of Q
            detections, as ``models.detr.detections`` gives them. Boxes are x0, y0, x1, y1 in
            pixels of ``image``.
    """

    name: str
    image: Tensor
    truth: dict[str, Tensor]
    found: dict[str, Tensor]


def unnormalized(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``[C, H, W]`` as it was before its channels lost ``mean`` and were divided by ``std``."""
    centre, spread = (torch.as_tensor(x, device=image.device)[:, None, None] for x in (mean, std))
    return (image.float() * spread + centre).clamp(0, 1)


def draw_detections(
    examples: Sequence[Example],
    path: Path,
    names: Mapping[int, str],
    threshold: float = 0.5,
    title: str = "",
) -> None:
    """Draw a sheet of examples: objects at the left, detections at the right; none, no sheet.

    Small images are enlarged by a whole number, large ones reduced.

    Args:
        names: of categories; a label that has none is shown as its number.
        threshold: the least score of a detection that is drawn.
    """
    from matplotlib.figure import Figure

    if not examples:
        return
    columns = 1 if len(examples) < 3 else 2
    rows = math.ceil(len(examples) / columns)
    sides = [_sides(example.image) for example in examples]
    # In inches; with room for a line of title above each picture.
    width = 0.2 + INCHES * max(width for _, width in sides)
    heights = [
        0.35 + INCHES * max(height for height, _ in sides[start : start + columns])
        for start in range(0, len(sides), columns)
    ]
    size = (2 * columns * width, sum(heights) + 0.4)
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    grid = figure.subplots(rows, 2 * columns, squeeze=False, height_ratios=heights).reshape(-1, 2)
    for axes in grid.ravel():
        axes.set_axis_off()
    for (left, right), example, side in zip(grid, examples, sides, strict=False):
        labels = example.truth["labels"].tolist()
        texts = [names.get(label, str(label)) for label in labels]
        _show(left, example.image, side, example.truth["boxes"], labels, texts)
        _title(left, f"{example.name}: {_count(labels, 'object')}")
        found = {key: value.detach().cpu() for key, value in example.found.items()}
        kept = (found["scores"] >= threshold) & found["boxes"].isfinite().all(-1)
        kept = kept.nonzero()[:, 0]
        kept = kept[found["scores"][kept].argsort()]  # the surest are drawn last, on top
        labels = found["labels"][kept].tolist()
        scores = found["scores"][kept].tolist()
        texts = [f"{names.get(n, str(n))} {s:.2f}" for n, s in zip(labels, scores, strict=True)]
        _show(right, example.image, side, found["boxes"][kept], labels, texts)
        _title(right, f"{_count(labels, 'detection')} of score {threshold:g} or more")
    if title:
        figure.suptitle(title, fontsize=10, color=INK)
    figure.savefig(path)


def boxed(image: Tensor, boxes: Tensor, colours: Sequence[str], side: tuple[int, int]) -> Tensor:
    """Resize ``image`` and draw ``boxes`` (in its own pixels) with a dark rim, that they show.

    Returns:
        uint8 ``[3, *side]``.
    """
    image = image.detach().cpu()
    if not image.is_floating_point():
        image = image.float() / 255
    larger = side[0] >= 2 * image.shape[1]
    drawn = torch.nn.functional.interpolate(
        image.float().expand(3, -1, -1)[None],
        size=side,
        mode="nearest" if larger else "bilinear",
        antialias=not larger,
    )[0]
    drawn = (drawn.clamp(0, 1) * 255).round().byte()
    if len(boxes):
        corners = _scaled(boxes, image, side)
        # Of the last pixel inside; lines go inwards.
        corners[:, 2:] = torch.maximum(corners[:, 2:] - 1, corners[:, :2])
        rim = corners + torch.tensor([-1, -1, 1, 1])
        drawn = draw_bounding_boxes(drawn, rim, colors="black", width=LINE + 2)
        drawn = draw_bounding_boxes(drawn, corners, colors=list(colours), width=LINE)
    return drawn


def draw_precision_recall(curves: PrecisionRecall, path: Path, title: str) -> None:
    """Draw precision against recall at IoU 0.5 and 0.75, and their mean over 0.5 to 0.95."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4.5), layout="constrained", dpi=150)
    axes = figure.subplots()
    styles = {
        "AP50": ("IoU 0.5", HELD, "-"),
        "AP75": ("IoU 0.75", EMA, "--"),
        "AP": ("mean over IoU 0.5 to 0.95", TRAIN, "-."),
    }
    for name, (label, colour, style) in styles.items():
        precision = curves.precision[name]
        area = sum(precision) / len(precision)
        if math.isnan(area):
            axes.text(0.5, 0.5, "no objects: not defined", ha="center", color=INK)
            break
        # The precision at a recall holds back to the recall before.
        axes.step(
            curves.recall,
            precision,
            where="pre",
            color=colour,
            linestyle=style,
            linewidth=1.8,
            label=f"{label}: {name} {100 * area:.1f} %",
        )
    else:
        axes.legend(frameon=False, loc="lower left", fontsize=9)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.02))
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    figure.suptitle(title, fontsize=11, color=INK)
    figure.savefig(path)


def _sides(image: Tensor) -> tuple[int, int]:
    """Height and width at which an image is shown."""
    height, width = image.shape[-2:]
    factor = SIDE / max(height, width)
    if factor >= 2:
        factor = math.floor(factor)
    return max(1, round(height * factor)), max(1, round(width * factor))


def _scaled(boxes: Tensor, image: Tensor, side: tuple[int, int]) -> Tensor:
    """Boxes of ``image`` in whole pixels of a picture of it, cut off at its rim."""
    height, width = side
    limits = torch.tensor([width, height, width, height])
    factors = limits / torch.tensor([image.shape[2], image.shape[1]]).repeat(2)
    corners = (boxes.detach().cpu().float() * factors).round().long()
    return torch.minimum(corners.clamp(min=0), limits)


def _show(
    axes: Any,
    image: Tensor,
    side: tuple[int, int],
    boxes: Tensor,
    labels: list[int],
    texts: list[str],
) -> None:
    colours = [COLOURS[label % len(COLOURS)] for label in labels]
    axes.imshow(boxed(image, boxes, colours, side).permute(1, 2, 0).numpy())
    height, width = side
    if not len(boxes):
        return
    corners = _scaled(boxes, image, side)[:, :3].tolist()
    for (x0, y0, x1), colour, text in zip(corners, colours, texts, strict=True):
        # Above the box, or inside where there is no room; towards the middle of the picture.
        above, left = y0 > 0.06 * height, x0 + x1 < width
        axes.annotate(
            text,
            (x0 if left else x1, y0),
            xytext=(0, 1.5 if above else -1.5),
            textcoords="offset points",
            ha="left" if left else "right",
            va="bottom" if above else "top",
            fontsize=6,
            color="black",
            parse_math=False,
            bbox={"boxstyle": "square,pad=0.15", "facecolor": colour, "lw": 0.4},
        )


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, fontsize=7, color=INK, parse_math=False)


def _count(things: Sequence[Any], name: str) -> str:
    return f"{len(things) or 'no'} {name}{'' if len(things) == 1 else 's'}"
