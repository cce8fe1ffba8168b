"""The interface of a task to the training loop, and the objects that the loop uses."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from training.data.digest import Digest
from training.data.loaders import batches_of, make_loader
from training.data.seeded import BadImage, BadImages, SeededStream
from training.distributed import Sharded, loader_workers, per_process_batch
from training.errors import UserError
from training.optim import make_optimizer
from training.progress import Progress
from training.report import SHARES, Panels
from training.run_directory import RunDirectory

_SHOWN = 5


@dataclass
class Step:
    """The results of a task for one batch.

    Attributes:
        count: number of samples in the batch.
        sums: further metrics, summed over the samples: fractions or, named ``loss_...``, losses.
        names: names of the samples, for reports of bad ones.
        units: number of units for the throughput; None: ``count``.
    """

    loss: Tensor
    count: int
    sums: dict[str, Tensor] = field(default_factory=dict)
    names: list[Any] = field(default_factory=list)
    units: int | None = None


class Task:
    """A model, the batches of an epoch, their loss, and the evaluation.

    Args:
        name: name of the run directory.
        about: header of the weights files; its classes must stay the same in a resumed run.

    Attributes:
        best: name of the metric that selects the best checkpoint.
        lower: whether lower values of ``best`` are better.
        line: parts of the line of an epoch, formatted with the values of a record; fractions are
            in percent. Parts without a value are omitted.
        advice: remedies for a loss that is not finite.
        note: printed when training starts.
        bad: images that do not decode; None for a task without images.
    """

    best, lower, unit, note = "loss", True, "images", ""
    line: Sequence[str] = ()
    result: str
    panels: Panels
    advice = (
        "a lower optim.lr, a longer sched.warmup_epochs, optim.clip_grad: 1.0 or "
        "run.precision: fp32 may help"
    )
    bad: BadImages | None = None
    steps: int

    def __init__(
        self, config: Any, accelerator: Accelerator, model: nn.Module, name: str, about: dict
    ) -> None:
        self.config, self.accelerator, self.model = config, accelerator, model
        self.name, self.about = name, about

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Create the optimiser of the model, or of its sharded copy."""
        return make_optimizer(model, self.config.optim, self.config.batch_size)

    @property
    def clip_grad(self) -> float | None:
        """Maximum norm of the gradient; None: no clipping."""
        return self.config.optim.clip_grad

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        """Yield the batches of an epoch for this process, without the first ``skip``."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Any, step: int) -> Step:
        """Compute the loss of a batch."""
        raise NotImplementedError

    def evaluate(self, models: list[nn.Module]) -> list[dict[str, Any]]:
        """Return the held-out metrics of each model, equal in all processes."""
        raise NotImplementedError

    def report(self) -> Any:
        """Evaluate the model, print the result and return the metrics."""
        (metrics,) = self.evaluate([self.model])
        if self.accelerator.is_main_process:
            print(self.verdict(metrics))
        return metrics

    def carried(self) -> Any:
        """Return the task's part of a training state."""
        return None

    def restore(self, carried: Any) -> None:
        """Restore the result of :meth:`carried` in a resumed run."""

    def skipped(self) -> None:
        """Reset the state of the last step, whose loss or gradient was not finite."""

    def digest(self) -> Digest:
        """Return the digest of the training data."""
        return {}

    def finish(self, directory: RunDirectory | None, model: nn.Module) -> None:
        """Write the task's own files of the trained model, in all processes."""

    def describe(self, record: dict[str, Any], epochs: int) -> str:
        """Return the line of an epoch, from its record."""
        values = self.shown(record)
        parts = [f"epoch {record['epoch']:{len(str(epochs))}}/{epochs}, step {record['step']}"]
        for part in self.line:
            with contextlib.suppress(KeyError):
                parts.append(part.format_map(values))
        return "  |  ".join(parts)

    def verdict(self, record: dict[str, Any]) -> str:
        """Return the result of an evaluation as text; of averaged weights, if there are any."""
        averaged = {key[4:]: value for key, value in record.items() if key.startswith("ema_")}
        return self.result.format_map(self.shown({**record, **averaged}))

    def shown(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return the values of a record for printing: fractions in percent."""
        return {
            key: math.nan if value is None else 100 * value if key in SHARES else value
            for key, value in record.items()
        }


class ImageTask(Task):
    """A task on images, or other samples, that loaders read.

    Args:
        sources: sources of the loaders, which may have lists ``left_out`` of unused files.
        loaders: this process's loaders of training, unless evaluation only, and evaluation.
        bad: images that do not decode, or None.

    Attributes:
        sums: names of the results of :meth:`measure`.
    """

    bad: BadImages
    sums: Sequence[str] = ("loss",)

    def __init__(
        self, sources: Sequence[Any], loaders: list[DataLoader], bad: BadImages | None, *given: Any
    ) -> None:
        super().__init__(*given)
        self.sources, self.loaders, self.bad = sources, [None, *loaders][-2:], bad
        self.left_out = [name for source in sources for name in getattr(source, "left_out", ())]
        if self.left_out and self.accelerator.is_main_process:
            more = ", ..." if len(self.left_out) > _SHOWN else ""
            print(f"{len(self.left_out)} left out: {', '.join(self.left_out[:_SHOWN])}{more}")
        if self.loaders[0] is not None:
            self.steps = len(loaders[0]) // self.config.grad_accum_steps
            if not self.steps:
                raise UserError(
                    f"batch_size: {self.config.batch_size} is more than the "
                    f"{len(loaders[0].dataset)} training {self.unit}"
                )

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        for batch in batches_of(self.loaders[0], epoch, skip):
            self.bad.note(batch.bad)
            if not len(batch.targets):
                raise UserError("no image of a whole training batch could be decoded")
            self.check(batch)
            yield batch.to(self.accelerator.device)

    def evaluate(self, models: list[nn.Module]) -> list[dict[str, Any]]:
        """Return the held-out means of :attr:`sums` and ``count`` of each model.

        The images are read once for all models. Each process evaluates its part, and only sums are
        exchanged, so parts may differ in size.
        """
        device, size = self.accelerator.device, len(self.sums) + 1
        sums = torch.zeros(len(models), size, dtype=torch.float64, device=device)
        with evaluating(*models):
            for batch in batches_of(self.loaders[1], 0):
                self.bad.note(batch.bad)
                self.missed(batch.bad)
                if not len(batch.targets):
                    continue
                self.check(batch)
                batch = batch.to(device)
                for number, model in enumerate(models):
                    values = self.measure(model, batch, number)
                    sums[number, -1] += len(batch.targets)
                    sums[number, :-1] += torch.stack([value.double() for value in values])
        rows = self.accelerator.reduce(sums, "sum").tolist()
        if not rows[0][-1]:
            raise UserError("no held-out image could be decoded: there is nothing to evaluate")
        return [
            {name: value / row[-1] for name, value in zip(self.sums, row, strict=False)}
            | {"count": int(row[-1])}
            for row in rows
        ]

    def finish(self, directory: RunDirectory | None, model: nn.Module) -> None:
        if directory is not None and self.left_out:
            directory.write_json("left_out.json", self.left_out)

    def check(self, batch: Any) -> None:
        """Check a non-empty batch before it is copied to a device."""

    def missed(self, bad: Sequence[BadImage]) -> None:
        """Exclude images from an evaluation."""

    def measure(self, model: nn.Module, batch: Any, number: int) -> list[Tensor]:
        """Return :attr:`sums` of a held-out batch; ``number``: index of the model."""
        raise NotImplementedError


def loader_of(
    config: Any, accelerator: Accelerator, dataset: Dataset, *, training: bool, **more: Any
) -> DataLoader:
    """Return this process's loader of a data set; ``more``: options of ``make_loader``."""
    batch = per_process_batch(accelerator, config.batch_size, config.grad_accum_steps)
    shares = {"rank": accelerator.process_index, "world": accelerator.num_processes}
    return make_loader(
        dataset,
        batch_size=batch if training else config.eval_batch_size or batch,
        training=training,
        seed=config.seed,
        workers=loader_workers(
            getattr(config.data, "workers", 0),  # texts are in memory
            digits=config.data.name == "digits",
            streams=isinstance(dataset, SeededStream),
        ),
        pin_memory=accelerator.device.type == "cuda",
        **{**shares, **more},
    )


@contextlib.contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put modules into evaluation mode, without gradients, and restore their modes."""
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    with torch.no_grad():
        yield
    for module, mode in zip(modules, modes, strict=True):
        module.train(mode)


@dataclass(kw_only=True)
class Context:
    """The objects and settings of one training run.

    Attributes:
        task: the task; with sharding, its model is updated from ``trained`` when needed.
        trained: the model that accelerate prepared, or the sharded copy.
        directory: the run directory; None except on the main process.
        epochs: epochs of the run, with cooldown.
    """

    task: Task
    trained: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Scheduler
    ema: ModelEmaV3 | None
    sharded: Sharded | None
    directory: RunDirectory | None
    progress: Progress
    epochs: int
    data: Digest

    def __post_init__(self) -> None:
        task = self.task
        self.config, self.accelerator, self.model = task.config, task.accelerator, task.model

    @property
    def learning_rate(self) -> float:
        """The highest learning rate of all parameter groups."""
        return max(group["lr"] for group in self.optimizer.param_groups)
