"""The task of train_cls.py: mixup and cutmix, loss and evaluation of a classifier."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

from training.cls.options import AugConfig
from training.data.loaders import Batch
from training.errors import UserError
from training.report import CLASSIFIER
from training.seeding import derive, forked
from training.task import ImageTask, Step


class Classify(ImageTask):
    """Training and evaluation of a classifier."""

    best, lower, panels, sums = "top1", False, CLASSIFIER, ("loss", "top1", "top5")
    line = (
        "train loss {train_loss:.3f}, accuracy {train_top1:5.2f} %",
        "held out loss {loss:.3f}, accuracy {top1:5.2f} %",
        "averaged weights {ema_top1:5.2f} %",
    )
    result = "held-out accuracy {top1:.2f} % ({wrong} of {count} wrong)"

    def __init__(self, aug: AugConfig, num_classes: int, *given: Any) -> None:
        super().__init__(*given)
        self.num_classes, self.smoothing = num_classes, aug.smoothing
        self.mixup = None
        if aug.mixup > 0 or aug.cutmix > 0:
            self.mixup = Mixup(
                mixup_alpha=aug.mixup,
                cutmix_alpha=aug.cutmix,
                prob=aug.mixup_prob,
                switch_prob=aug.mixup_switch_prob,
                mode=aug.mixup_mode,
                label_smoothing=aug.smoothing,
                num_classes=num_classes,
            )

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Step:
        """Compute the cross entropy of a batch, and the accuracy by the main labels."""
        images, targets = batch.images, batch.targets
        if self.mixup is None:
            logits = model(images)
            loss = F.cross_entropy(logits, targets, label_smoothing=self.smoothing)
        else:
            # timm needs an even batch. Batches may miss a sample that did not decode.
            even = len(targets) // 2 * 2
            images, targets = images[:even], targets[:even]
            with forked(derive(self.config.seed, "mix", step)):
                images, soft = self.mixup(images, targets)
            targets = soft.argmax(1)
            logits = model(images)
            loss = F.cross_entropy(logits, soft)
        correct = (logits.detach().argmax(1) == targets).sum()
        return Step(loss, len(targets), {"top1": correct})

    def measure(self, model: nn.Module, batch: Batch, number: int) -> list[Tensor]:
        """Return the sums of the cross entropy, and of correct labels, top-1 and top-5."""
        with self.accelerator.autocast():
            logits = model(batch.images).float()
        ranked = logits.topk(min(5, logits.shape[1])).indices == batch.targets[:, None]
        loss = F.cross_entropy(logits, batch.targets, reduction="sum")
        return [loss, ranked[:, 0].sum(), ranked.sum()]

    def check(self, batch: Batch) -> None:
        """Raise if a class is not in the model."""
        low, high = int(batch.targets.min()), int(batch.targets.max())
        if low < 0 or high >= self.num_classes:
            raise UserError(
                f"the data has class {low if low < 0 else high}, but the model has "
                f"{self.num_classes} classes (0 to {self.num_classes - 1}); set model.num_classes"
            )

    def shown(self, record: dict[str, Any]) -> dict[str, Any]:
        values = super().shown(record)
        if "top1" in record:
            values["wrong"] = record["count"] - round(record["top1"] * record["count"])
        return values
