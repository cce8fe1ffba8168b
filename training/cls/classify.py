"""The task of train_cls.py: batches, mixing, the loss and the evaluation of a classifier."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.data import Mixup
from torch import Tensor, nn
from torch.utils.data import DataLoader

from training.badimages import BadImages
from training.cls.options import AugConfig
from training.data.loaders import Batch, batches_of, set_epoch
from training.errors import UserError
from training.plan import Step
from training.run import Task
from training.seeding import derive, forked


class Classify(Task):
    """The functions that :class:`training.loop.Loop` asks of a task.

    Args:
        loaders: training and evaluation loader of this process; training may be None.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        loaders: tuple[DataLoader | None, DataLoader],
        aug: AugConfig,
        num_classes: int,
        seed: int,
        bad: BadImages,
    ) -> None:
        self.accelerator, self.loaders, self.seed, self.bad = accelerator, loaders, seed, bad
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

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """Yield the training batches of an epoch, without the first ``skip``."""
        loader = self.loaders[0]
        assert loader is not None, "an evaluation has no training batches"
        for batch in batches_of(loader, epoch, skip):
            self.bad.note(batch.bad)
            if not len(batch.targets):
                raise UserError("no image of a whole training batch could be decoded")
            self._check_targets(batch.targets)
            yield self._move(batch)

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Step:
        """Cross entropy of a batch; accuracy counts the heavier label where two are mixed."""
        images, targets = batch.images, batch.targets
        if self.mixup is None:
            logits = model(images)
            loss = F.cross_entropy(logits, targets, label_smoothing=self.smoothing)
        else:
            # timm mixes pairs. Batches are even, but one may have lost a sample.
            even = len(targets) // 2 * 2
            images, targets = images[:even], targets[:even]
            with forked(derive(self.seed, "mix", step)):
                images, soft = self.mixup(images, targets)
            targets = soft.argmax(1)
            logits = model(images)
            loss = F.cross_entropy(logits, soft)
        correct = (logits.detach().argmax(1) == targets).sum()
        return Step(loss, len(targets), {"top1": correct})

    @torch.no_grad()
    def evaluate(self, models: list[nn.Module]) -> list[dict[str, float]]:
        """Return ``loss``, ``top1``, ``top5`` (shares) and ``count`` of each model, held out.

        The images are read once for all models. Each process evaluates its own part, and only the
        sums meet: parts may be unequal.
        """
        training = [model.training for model in models]
        for model in models:
            model.eval()
        sums = torch.zeros(len(models), 4, dtype=torch.float64, device=self.accelerator.device)
        set_epoch(self.loaders[1], 0)
        for batch in self.loaders[1]:
            self.bad.note(batch.bad)
            if not len(batch.targets):
                continue
            self._check_targets(batch.targets)
            batch = self._move(batch)
            for model, row in zip(models, sums, strict=True):
                with self.accelerator.autocast():
                    logits = model(batch.images)
                row += self._sums(logits.float(), batch.targets)
        for model, mode in zip(models, training, strict=True):
            model.train(mode)
        figures: list[dict[str, float]] = []
        for loss, top1, top5, count in self.accelerator.reduce(sums, "sum").tolist():
            if not count:
                raise UserError("no held-out image could be decoded: there is nothing to evaluate")
            shares = {"loss": loss / count, "top1": top1 / count, "top5": top5 / count}
            figures.append({**shares, "count": int(count)})
        return figures

    def _sums(self, logits: Tensor, targets: Tensor) -> Tensor:
        ranked = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        return torch.stack(
            [
                F.cross_entropy(logits, targets, reduction="sum").double(),
                ranked[:, 0].sum().double(),
                ranked.sum().double(),
                torch.tensor(float(len(targets)), dtype=torch.float64, device=logits.device),
            ]
        )

    def _check_targets(self, targets: Tensor) -> None:
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= self.num_classes:
            raise UserError(
                f"the data holds class {low if low < 0 else high}, but the model has "
                f"{self.num_classes} classes (0 to {self.num_classes - 1}); set model.num_classes"
            )

    def _move(self, batch: Batch) -> Batch:
        device = self.accelerator.device
        return Batch(
            batch.images.to(device, non_blocking=True),
            batch.targets.to(device, non_blocking=True),
        )


def verdict(figures: dict[str, Any]) -> str:
    """Say what an evaluation, or a run's last one, came to."""
    prefix = "ema_" if "ema_top1" in figures else ""
    top1, count = figures[f"{prefix}top1"], figures[f"{prefix}count"]
    wrong = count - round(top1 * count)
    return f"held-out accuracy {100 * top1:.2f} % ({wrong} of {count} wrong)"


def line(record: dict[str, Any], epochs: int) -> str:
    """A line for people from an epoch's record."""
    parts = [
        f"epoch {record['epoch']:{len(str(epochs))}}/{epochs}",
        f"train loss {record['train_loss']:.3f}, accuracy {100 * record['train_top1']:5.2f} %",
    ]
    if "top1" in record:
        parts.append(f"held out loss {record['loss']:.3f}, accuracy {100 * record['top1']:5.2f} %")
    if "ema_top1" in record:
        parts.append(f"averaged weights {100 * record['ema_top1']:5.2f} %")
    return "  |  ".join(parts)
