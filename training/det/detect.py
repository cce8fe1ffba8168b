"""The task of train_det.py: batches, DETR's loss, and COCO's evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.ops import box_convert
from torchvision.transforms.functional import pil_to_tensor

from models.detr import Criterion, detections
from training.badimages import BadImages
from training.data.coco import CocoSource
from training.data.detection import DetectionBatch, collate_detection
from training.data.loaders import batches_of, set_epoch
from training.det.average_precision import BoxEvaluation
from training.det.pictures import Example
from training.errors import UserError
from training.plan import Step
from training.run import Task

PARTS = ("loss_ce", "loss_bbox", "loss_giou")


class Detect(Task):
    """The functions that :func:`training.run.train` asks of a task.

    Args:
        loaders: training and evaluation loader of this process; training may be None.
        held_out: what the evaluation loader reads from.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        loaders: tuple[DataLoader | None, DataLoader],
        criterion: Criterion,
        held_out: CocoSource,
        bad: BadImages,
    ) -> None:
        self.accelerator, self.loaders, self.bad = accelerator, loaders, bad
        self.criterion, self.held_out = criterion.to(accelerator.device), held_out
        self.truth = held_out.coco_ground_truth()
        self.last: BoxEvaluation | None = None
        self._ids = {held_out.name(n): held_out.image_id(n) for n in range(len(held_out))}

    def batches(self, epoch: int, skip: int = 0) -> Iterator[DetectionBatch]:
        """Yield the training batches of an epoch, without the first ``skip``."""
        loader = self.loaders[0]
        assert loader is not None, "an evaluation has no training batches"
        for batch in batches_of(loader, epoch, skip):
            self.bad.note(batch.bad)
            if not batch.targets:
                raise UserError("no image of a whole training batch could be decoded")
            yield batch.to(self.accelerator.device)

    def loss(self, model: nn.Module, batch: DetectionBatch, step: int) -> Step:
        """DETR's loss of a batch, and its parts for the last decoder layer."""
        found = self.criterion(model(batch.images, batch.mask), batch.targets)
        count = len(batch.targets)
        parts = {name: found[name].detach() * count for name in PARTS}
        names = [target["image_id"] for target in batch.targets]
        return Step(found["loss"], count, parts, names)

    @torch.no_grad()
    def evaluate(self, models: list[nn.Module]) -> list[dict[str, float]]:
        """Return ``loss``, its parts and COCO's twelve numbers of each model, held out.

        The last model's evaluation is kept in ``last``, for its curves and detections. The images
        are read once for all models. Each process evaluates its own part, and parts may be
        unequal; the figures are the same in every process.
        """
        parts = [*models, self.criterion]
        training = [part.training for part in parts]
        for part in parts:
            part.eval()
        evaluations = [BoxEvaluation(self.truth, self.accelerator) for _ in models]
        sums = torch.zeros(
            len(models), 2 + len(PARTS), dtype=torch.float64, device=self.accelerator.device
        )
        set_epoch(self.loaders[1], 0)
        for batch in self.loaders[1]:
            self.bad.note(batch.bad)
            skipped = [self._ids[item.name] for item in batch.bad]
            for evaluation in evaluations:
                evaluation.skip(skipped)
            if not batch.targets:
                continue
            batch = batch.to(self.accelerator.device)
            for model, evaluation, row in zip(models, evaluations, sums, strict=True):
                row += self._add(model, batch, evaluation)
        for part, mode in zip(parts, training, strict=True):
            part.train(mode)
        self.last = evaluations[-1]
        figures: list[dict[str, float]] = []
        rows = self.accelerator.reduce(sums, "sum").tolist()
        for (*losses, count), evaluation in zip(rows, evaluations, strict=True):
            if not count:
                raise UserError("no held-out image could be decoded: there is nothing to evaluate")
            means = [value / count for value in losses]
            figures.append(
                {
                    **dict(zip(("loss", *PARTS), means, strict=True)),
                    **evaluation.summarize(),
                    "count": int(count),
                }
            )
        return figures

    @torch.no_grad()
    def examples(self, model: nn.Module, count: int) -> list[Example]:
        """Return ``count`` held-out images, spread over all, with what the model finds in them."""
        dataset, model = self.loaders[1].dataset, model.eval()
        found = []
        for index in range(0, len(dataset), max(1, len(dataset) // count))[:count]:  # type: ignore[arg-type]
            batch = collate_detection([dataset[0, index]])
            if not batch.targets:
                continue
            batch = batch.to(self.accelerator.device)
            with self.accelerator.autocast():
                outputs = model(batch.images, batch.mask)
            image, annotations = self.held_out.read(index)
            boxes = box_convert(annotations.boxes, "xywh", "xyxy")
            found.append(
                Example(
                    Path(self.held_out.name(index)).name,
                    pil_to_tensor(image),
                    {"labels": annotations.category_ids, "boxes": boxes},
                    detections(outputs, torch.tensor([batch.targets[0]["size"]]))[0],
                )
            )
        return found

    def _add(self, model: nn.Module, batch: DetectionBatch, evaluation: BoxEvaluation) -> Tensor:
        """Add a batch's detections to an evaluation; return the sums of its losses and images."""
        with self.accelerator.autocast():
            outputs: dict[str, Any] = model(batch.images, batch.mask)
        losses = self.criterion(outputs, batch.targets)
        sizes = torch.tensor([target["size"] for target in batch.targets])
        images = [target["image_id"] for target in batch.targets]
        evaluation.update(images, detections(outputs, sizes))
        count = len(images)
        values = [losses[name].double() * count for name in ("loss", *PARTS)]
        return torch.stack([*values, values[0].new_tensor(float(count))])
