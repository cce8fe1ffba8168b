"""The task of train_det.py: batches, DETR's loss, and COCO's evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from models.detr import Criterion, detections
from training.average_precision import BoxEvaluation
from training.badimages import BadImages
from training.data.coco import CocoSource
from training.data.detection import DetectionBatch
from training.data.loaders import set_epoch
from training.errors import UserError
from training.loop import Step


class Detect:
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
        self._ids = {held_out.name(n): held_out.image_id(n) for n in range(len(held_out))}

    def batches(self, epoch: int) -> Iterator[DetectionBatch]:
        """Yield the training batches of an epoch."""
        loader = self.loaders[0]
        assert loader is not None, "an evaluation has no training batches"
        set_epoch(loader, epoch)
        for batch in loader:
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

    def evaluate(self, models: list[nn.Module]) -> list[dict[str, float]]:
        """Return ``loss``, its parts and COCO's twelve numbers of each model, held out."""
        return [figures for figures, _ in self.measure(models)]

    @torch.no_grad()
    def measure(self, models: list[nn.Module]) -> list[tuple[dict[str, float], BoxEvaluation]]:
        """The same with the evaluation itself, for its curves and detections.

        The images are read once for all models. Each process evaluates its own part, and parts may
        be unequal; the figures are the same in every process.
        """
        training = [model.training for model in models]
        for model in models:
            model.eval()
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
        for model, mode in zip(models, training, strict=True):
            model.train(mode)
        found = []
        for row, evaluation in zip(
            self.accelerator.reduce(sums, "sum").tolist(), evaluations, strict=True
        ):
            *losses, count = row
            if not count:
                raise UserError("no held-out image could be decoded: there is nothing to evaluate")
            means = {
                name: value / count for name, value in zip(("loss", *PARTS), losses, strict=True)
            }
            found.append(({**means, **evaluation.summarize(), "count": int(count)}, evaluation))
        return found

    def _add(self, model: nn.Module, batch: DetectionBatch, evaluation: BoxEvaluation) -> Tensor:
        """Add a batch's detections to an evaluation; return the sums of its losses and images."""
        with self.accelerator.autocast():
            outputs: dict[str, Any] = model(batch.images, batch.mask)
        # Processes may have unequal parts, so the loss is over this one's boxes.
        losses = self.criterion(outputs, batch.targets, together=False)
        sizes = torch.tensor([target["size"] for target in batch.targets])
        images = [target["image_id"] for target in batch.targets]
        evaluation.update(images, detections(outputs, sizes))
        count = len(images)
        values = [losses[name].double() * count for name in ("loss", *PARTS)]
        return torch.stack([*values, values[0].new_tensor(float(count))])


PARTS = ("loss_ce", "loss_bbox", "loss_giou")
