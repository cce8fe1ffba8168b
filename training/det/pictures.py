"""Pictures of a detector: objects and detections, and precision against recall."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from irpe.tools.pictures import figure
from training.det.average_precision import PrecisionRecall
from training.report import EMA, HELD, INK, TRAIN, style

# Light colours, for black text, that colour-blind people can distinguish.
COLOURS = ("#77AADD", "#EE8866", "#EEDD88", "#FFAABB", "#99DDFF", "#44BB99", "#BBCC33", "#AAAA00")
COLOURS += ("#DDDDDD", "#CC99FF")
_INCHES = 2.7  # width of an image in the sheet
_TITLE = 0.35
_LEAST = 0.5  # minimum score of drawn detections


@dataclass
class Example:
    """One image with its objects and its detections.

    Attributes:
        image: ``[3, H, W]``, in [0, 1] or uint8, without padding.
        truth: labels ``[T]`` and boxes ``[T, 4]``: x0, y0, x1, y1 in pixels of ``image``.
        found: scores ``[Q]``, labels ``[Q]`` and boxes ``[Q, 4]``, from ``models.detr.detections``.
    """

    name: str
    image: Tensor
    truth: dict[str, Tensor]
    found: dict[str, Tensor]


def draw_detections(examples: Sequence[Example], path: Path, names: Mapping[int, str]) -> None:
    """Draw a sheet of examples, with objects on the left and detections on the right.

    Args:
        examples: the examples; without any, nothing is drawn.
        names: names of categories; a label without a name is shown as a number.
    """
    if not examples:
        return
    columns = 1 if len(examples) < 3 else 2
    heights = [_TITLE + _INCHES * min(1, x.image.shape[-2] / x.image.shape[-1]) for x in examples]
    heights = [max(heights[i : i + columns]) for i in range(0, len(heights), columns)]
    made = figure(2 * columns * (_INCHES + 0.2), sum(heights) + 0.4)
    grid = made.subplots(len(heights), 2 * columns, squeeze=False, height_ratios=heights)
    for axes in grid.flat:
        axes.set_axis_off()
    for example, (left, right) in zip(examples, grid.reshape(-1, 2), strict=False):
        truth, found = (
            {key: value.detach().cpu() for key, value in part.items()}
            for part in (example.truth, example.found)
        )
        labels = truth["labels"].tolist()
        _draw(left, example, truth["boxes"], labels, [names.get(n, str(n)) for n in labels])
        small = {"fontsize": 7, "color": INK, "parse_math": False}
        left.set_title(f"{example.name}: {_count(labels, 'object')}", **small)
        kept = (found["scores"] >= _LEAST) & found["boxes"].isfinite().all(-1)
        kept = kept.nonzero()[:, 0]
        kept = kept[found["scores"][kept].argsort()]  # draw the highest score last
        labels, scores = found["labels"][kept].tolist(), found["scores"][kept].tolist()
        texts = [f"{names.get(n, str(n))} {s:.2f}" for n, s in zip(labels, scores, strict=True)]
        _draw(right, example, found["boxes"][kept], labels, texts)
        right.set_title(f"{_count(labels, 'detection')} of score {_LEAST:g} or more", **small)
    made.savefig(path)


def draw_precision_recall(curves: PrecisionRecall, path: Path, title: str) -> None:
    """Draw precision against recall at IoU 0.5 and 0.75, and their mean over 0.5 to 0.95."""
    made = figure(5.5, 5.0)
    axes = made.subplots()
    lines = {
        "AP50": ("IoU 0.5", HELD, "-"),
        "AP75": ("IoU 0.75", EMA, "--"),
        "AP": ("mean over IoU 0.5 to 0.95", TRAIN, "-."),
    }
    for name, (label, colour, line) in lines.items():
        precision = curves[name]
        area = sum(precision) / len(precision)
        if math.isnan(area):
            axes.text(0.5, 0.5, "no objects: not defined", ha="center", color=INK)
            break
        # Precision is constant between recalls, hence steps.
        text = f"{label}: {name} {100 * area:.1f} %"
        shape = {"color": colour, "linestyle": line, "linewidth": 1.8}
        axes.step(curves["recall"], precision, where="pre", label=text, **shape)
    else:
        # Below the axes, since curves may pass through any part of them.
        made.legend(frameon=False, loc="outside lower center", fontsize=9)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.02))
    style(axes)
    made.suptitle(title, fontsize=11, color=INK)
    made.savefig(path)


def _draw(axes: Any, example: Example, boxes: Tensor, labels: list[int], texts: list[str]) -> None:
    """Draw an image with boxes, clipped to the image, and their texts."""
    from matplotlib.patches import Rectangle

    image = example.image.detach().cpu().expand(3, -1, -1)
    height, width = image.shape[1:]
    axes.imshow(image.permute(1, 2, 0).numpy(), extent=(0, width, height, 0))
    limits = boxes.new_tensor([width, height, width, height])
    corners = boxes.clamp(min=0).minimum(limits).tolist()
    for (x0, y0, x1, y1), label, text in zip(corners, labels, texts, strict=True):
        colour = COLOURS[label % len(COLOURS)]
        for edge, line in (("black", 2.4), (colour, 1.2)):  # a dark rim, visible on light images
            box = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=edge, linewidth=line)
            axes.add_patch(box)
        # Above the box, or inside if there is no space; towards the middle of the image.
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


def _count(things: Sequence[Any], name: str) -> str:
    return f"{len(things) or 'no'} {name}{'' if len(things) == 1 else 's'}"
