"""COCO's twelve metrics for boxes, computed by pycocotools from all processes."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Iterable
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from training.distributed import from_main_process
from training.errors import UserError

# In the order of pycocotools: average precision over IoU 0.5 to 0.95, at 0.5 and at 0.75, of small,
# medium and large objects; average recall of the best 1, 10 and 100 detections of an image and
# category, and by size.
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
_SHOWN = 6


# ``recall``: 101 values from 0 to 1. ``AP50``, ``AP75`` and ``AP``: the precision at each recall,
# for all sizes, averaged over categories with objects; at one IoU, or averaged over IoU 0.5 to
# 0.95. The mean of a curve is the metric of the same name. nan: undefined.
PrecisionRecall = dict[str, list[float]]
# The metrics by name, the curves, and pycocotools' text.
Found = tuple[dict[str, float], PrecisionRecall, str]


class BoxEvaluation:
    """Collects detections in each process, and evaluates all of them on the main process.

    As in pycocotools, all images of the ground truth count, except those passed to :meth:`skip`:
    objects of images without detections are missed. An image that occurs more than once counts
    once: the first in the process of lowest rank.

    Every process must call :meth:`results`, :meth:`summarize`, :meth:`curves` and :meth:`summary`,
    in the same order. After that nothing can be added.

    Args:
        ground_truth: content of an instances file; it is not changed. Defaults of annotations:
            ``area`` of the box, ``iscrowd`` 0.
        accelerator: joins the processes; None: a single process.
    """

    def __init__(
        self, ground_truth: dict[str, Any], accelerator: Accelerator | None = None
    ) -> None:
        self.accelerator = accelerator
        self._images = {image["id"] for image in ground_truth["images"]}
        annotations = _numbered(ground_truth["annotations"])
        self._truth = {"categories": ground_truth["categories"], "annotations": annotations}
        self._rows: dict[int, np.ndarray] = {}
        self._skipped: set[int] = set()
        self._gathered = False

    def update(self, image_ids: Iterable[int], detections: Iterable[dict[str, Tensor]]) -> None:
        """Add the detections of some images.

        Args:
            detections: for each image, scores ``[Q]``, labels ``[Q]`` (category ids) and boxes
                ``[Q, 4]`` (x0, y0, x1, y1 in pixels of the image as annotated), on any device.
                pycocotools uses the best 100 of each image and category. Unknown labels are in the
                results, but do not count.

        Raises:
            UserError: if an image is not in the ground truth, or a number is not finite.
        """
        for image_id, found in zip(image_ids, detections, strict=True):
            image = self._known(image_id)
            scores, labels, boxes = (
                found[key].detach().cpu().double() for key in ("scores", "labels", "boxes")
            )
            low, high = boxes.reshape(-1, 4).split(2, dim=1)
            rows = torch.cat((low, high - low, scores[:, None], labels[:, None]), dim=1)
            if not rows.isfinite().all():
                raise UserError(
                    f"image {image}: detections are not finite; the model's weights, or its "
                    "numbers in this precision, are broken (run.precision: fp32 may help)"
                )
            self._rows.setdefault(image, rows.numpy())

    def skip(self, image_ids: Iterable[int]) -> None:
        """Exclude images and their objects from the evaluation, unless they have detections."""
        self._skipped.update(self._known(image) for image in image_ids)

    def results(self) -> list[dict[str, Any]]:
        """Return the detections of all processes in COCO's result format, by ascending image."""
        self._gather()
        return [
            {"image_id": image, "category_id": int(label), "bbox": box, "score": score}
            for image in sorted(self._rows)
            for *box, score, label in self._rows[image].tolist()
        ]

    def summarize(self) -> dict[str, float]:
        """Return the metrics of :data:`NAMES`, in [0, 1], in every process.

        A metric without objects is nan (pycocotools prints -1); one with objects but without
        detections is 0.
        """
        return self._found[0]

    def curves(self) -> PrecisionRecall:
        """Return precision against recall, in every process."""
        return self._found[1]

    def summary(self) -> str:
        """Return pycocotools' text of the metrics, in every process."""
        return self._found[2]

    def _known(self, image_id: int) -> int:
        if self._gathered:
            raise RuntimeError("this evaluation is finished; make a new BoxEvaluation")
        image = int(image_id)
        if image not in self._images:
            some = ", ".join(map(str, sorted(self._images)[:_SHOWN])) or "none"
            raise UserError(f"image id {image} is not in the ground truth, which has {some} ...")
        return image

    def _gather(self) -> None:
        if not self._gathered and self.accelerator and self.accelerator.num_processes > 1:
            rows: dict[int, np.ndarray] = {}
            for found, skipped in gather_object([(self._rows, self._skipped)]):
                rows = found | rows  # lower ranks come first, and are kept
                self._skipped = self._skipped | skipped
            self._rows = rows
        self._gathered = True

    @functools.cached_property
    def _found(self) -> Found:
        found, results = None, self.results()
        if self.accelerator is None or self.accelerator.is_main_process:
            left_out = self._skipped - self._rows.keys()
            found = _evaluated(self._truth, results, sorted(self._images - left_out))
        return found if self.accelerator is None else from_main_process(self.accelerator, found)


def _numbered(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return copies of annotations or results, since pycocotools modifies them."""
    return [
        # From 1: pycocotools treats an object of id 0 as missed.
        {"area": entry["bbox"][2] * entry["bbox"][3], "iscrowd": 0, **entry, "id": number}
        for number, entry in enumerate(entries, start=1)
    ]


def _evaluated(truth: dict[str, Any], results: list[dict[str, Any]], images: list[int]) -> Found:
    text = io.StringIO()
    with redirect_stdout(io.StringIO()):
        given, found = COCO(), COCO()
        # loadRes does not accept an empty list.
        given.dataset, found.dataset = truth, {**truth, "annotations": _numbered(results)}
        for coco in (given, found):
            coco.createIndex()
        evaluation = COCOeval(given, found, iouType="bbox")
        evaluation.params.imgIds = images
        evaluation.evaluate()
        evaluation.accumulate()
        with redirect_stdout(text):
            evaluation.summarize()
    stats = [math.nan if value == -1 else float(value) for value in evaluation.stats]
    thresholds, recalls = evaluation.params.iouThrs, evaluation.params.recThrs
    # Axes: IoU, recall, category; then area "all" and 100 detections.
    precision = evaluation.eval["precision"][..., 0, -1]
    precision = precision[:, :, (precision > -1).all((0, 1))]
    chosen = {"AP50": np.isclose(thresholds, 0.5), "AP75": np.isclose(thresholds, 0.75)}
    chosen["AP"] = thresholds > 0
    curves = {name: [math.nan] * len(recalls) for name in chosen}
    if precision.size:
        curves = {name: precision[rows].mean((0, 2)).tolist() for name, rows in chosen.items()}
    numbers = dict(zip(NAMES, stats, strict=True))
    return numbers, {"recall": recalls.tolist(), **curves}, text.getvalue().rstrip()
