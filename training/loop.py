"""The training loop: steps, evaluation, checkpoints and records, whatever the task.

A task gives three functions: the batches of an epoch, the loss of a batch, and the evaluation of a
model. Nothing random outlives a step: the generators are seeded from (seed, step, process).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from training.checkpoints import save_state, save_weights
from training.errors import UserError
from training.progress import Progress
from training.runfolder import RunFolder
from training.seeding import derive


@dataclass
class Step:
    """What a task computed for one batch.

    Attributes:
        loss: the mean over the batch. count: its samples. sums: further figures, summed over the
            samples: shares of them or, named ``loss_...``, parts of the loss.
        names: the samples, for whoever has to look for a bad one.
        units: what the pace counts; None: the samples.
    """

    loss: Tensor
    count: int
    sums: dict[str, Tensor] = field(default_factory=dict)
    names: list[Any] = field(default_factory=list)
    units: int | None = None


@dataclass(kw_only=True)
class Plan:
    """The figures of a run.

    Attributes:
        eval_every: epochs between two evaluations; the last epoch always has one.
        best: name of the evaluation figure that decides which checkpoint is the best; the highest
            one or, with ``lower``, the lowest.
        advice: what may help where the loss is not finite.
        about: what the header of a weights file says of them.
    """

    epochs: int
    steps_per_epoch: int
    accumulate: int = 1
    clip_grad: float | None = None
    save_every: int = 1
    seed: int = 0
    eval_every: int = 1
    best: str = "top1"
    lower: bool = False
    advice: str = ""
    about: dict[str, Any] = field(default_factory=dict)


class Loop:
    """Trains a model: ``raw`` as the task built it, ``model`` as accelerate prepared it."""

    def __init__(
        self,
        accelerator: Accelerator,
        raw: nn.Module,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Scheduler,
        ema: ModelEmaV3 | None,
        folder: RunFolder | None,
        plan: Plan,
        progress: Progress,
        carried: Callable[[], Any] = lambda: None,
    ) -> None:
        self.accelerator, self.raw, self.model = accelerator, raw, model
        self.optimizer, self.schedule, self.ema = optimizer, schedule, ema
        self.folder, self.plan, self.progress, self.carried = folder, plan, progress, carried
        self.step = self.epoch = 0
        self.best = math.inf if plan.lower else -math.inf
        self._recent: list[dict[str, Any]] = []  # the batches since the loss was last looked at
        # Reading a number back stalls a GPU, so there it is not done at every step.
        self._look_every = 1 if accelerator.device.type == "cpu" else 10

    def fit(
        self,
        batches: Callable[[int], Iterator[Any]],
        loss: Callable[[nn.Module, Any, int], Step],
        evaluate: Callable[[list[nn.Module]], list[dict[str, float]]],
        describe: Callable[[dict[str, Any]], str],
    ) -> dict[str, Any]:
        """Train all epochs; return the last epoch's record.

        Args:
            batches: the batches of an epoch, at least steps_per_epoch x accumulate of them.
            loss: ``loss(model, batch, step)``.
            evaluate: figures of each of several models, the same in every process.
            describe: one line for people from an epoch's record.
        """
        record: dict[str, Any] = {}
        for epoch in range(self.epoch, self.plan.epochs):
            start, cpu = time.perf_counter(), -time.process_time()
            models = [self.raw] if self.ema is None else [self.raw, self.ema.module]
            trained = self._train_epoch(epoch, batches(epoch), loss)
            cpu += time.process_time()  # of all threads of this process
            due = (epoch + 1) % self.plan.eval_every == 0 or epoch + 1 == self.plan.epochs
            figures = evaluate(models) if due else []
            record = {
                "epoch": epoch + 1,
                "step": self.step,
                "lr": max(group["lr"] for group in self.optimizer.param_groups),
                **{f"train_{name}": value for name, value in trained.items()},
            }
            if figures:
                record.update(figures[0])
            for averaged in figures[1:]:
                record.update({f"ema_{name}": value for name, value in averaged.items()})
            unit = self.progress.unit
            rate = record[f"{unit}_per_second"] = round(
                self.progress.pace * self.accelerator.num_processes, 1
            )
            record["train_cpu_seconds"] = round(cpu, 3)
            record["seconds"] = round(time.perf_counter() - start, 3)
            self._keep(epoch, record)
            left = self.progress.time_left
            self.progress.say(f"{describe(record)}  |  {rate:,.0f} {unit}/s, {left} left")
        return record

    def restore(self, state: dict[str, Any]) -> None:
        """Go on after the epoch at whose end ``state`` was written; before :meth:`fit`."""
        if state["epoch"] >= self.plan.epochs:
            raise UserError(f"resume: the run has finished its {state['epoch']} epochs")
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
        self.raw.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.progress.skip(self.step)

    def _train_epoch(
        self,
        epoch: int,
        batches: Iterator[Any],
        loss: Callable[[nn.Module, Any, int], Step],
    ) -> dict[str, float]:
        """Run one epoch's steps; return its mean loss and figures over all processes."""
        self.model.train()
        self.progress.resume_clock()
        totals: dict[str, Tensor] = {}
        for _ in range(self.plan.steps_per_epoch):
            self.schedule.step_update(self.step)
            count = self._one_step(batches, loss, totals)
            self.step += 1
            figures = None
            if self.step % self._look_every == 0:
                figures = self._figures(epoch, totals)
            self.progress.step(epoch, count, figures)
        self._figures(epoch, totals)
        names = sorted(totals)
        summed = self.accelerator.reduce(torch.stack([totals[name] for name in names]), "sum")
        mean = dict(zip(names, summed.tolist(), strict=True))
        return {name: mean[name] / mean["count"] for name in names if name != "count"}

    def _one_step(
        self,
        batches: Iterator[Any],
        loss: Callable[[nn.Module, Any, int], Step],
        totals: dict[str, Tensor],
    ) -> int:
        """One optimiser step over ``accumulate`` batches; return this process's units."""
        count = 0
        for part in range(self.plan.accumulate):
            torch.manual_seed(
                derive(self.plan.seed, "step", self.step, part, self.accelerator.process_index)
            )
            try:
                batch = next(batches)
            except StopIteration:
                raise UserError(
                    f"the data ended after {self.step} steps, before the epoch did: "
                    "the data set is shorter than it says"
                ) from None
            last = part == self.plan.accumulate - 1
            if last:
                result = loss(self.model, batch, self.step)
                self.accelerator.backward(result.loss / self.plan.accumulate)
            else:
                with self.accelerator.no_sync(self.model):
                    result = loss(self.model, batch, self.step)
                    self.accelerator.backward(result.loss / self.plan.accumulate)
            sums = {"loss": result.loss.detach() * result.count, **result.sums}
            sums["count"] = torch.tensor(result.count, device=result.loss.device)
            for name, value in sums.items():
                totals[name] = totals.get(name, 0) + value.double()
            count += result.count if result.units is None else result.units
            self._recent.append({"step": self.step, "names": result.names})
        if self.plan.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.plan.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.raw, step=self.step)
        return count

    def _figures(self, epoch: int, totals: dict[str, Tensor]) -> dict[str, str]:
        """Return the running means as text; stop the run if the loss is not finite."""
        means = {name: float(value) / float(totals["count"]) for name, value in totals.items()}
        if not math.isfinite(means["loss"]):
            self._stop(epoch, means["loss"])
        self._recent.clear()
        return {
            name: f"{value:.3f}" if name.startswith("loss") else f"{100 * value:.1f} %"
            for name, value in means.items()
            if name != "count"
        }

    def _stop(self, epoch: int, loss: float) -> NoReturn:
        """Raise for a loss that is not finite, and leave a note of the batches it came from."""
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        where = ""
        if self.folder is not None and any(batch["names"] for batch in self._recent):
            self.folder.write_json("nonfinite.json", {"epoch": epoch + 1, "batches": self._recent})
            where = f" ({self.folder / 'nonfinite.json'} names the images)"
        raise UserError(
            f"the loss became {loss} in epoch {epoch + 1}, by step {self.step}, at a "
            f"learning rate of {rate:.3g}{where}; {self.plan.advice}"
        )

    def _keep(self, epoch: int, record: dict[str, Any]) -> None:
        """Log the record and write the checkpoints that are due, on the main process."""
        score = record.get(f"ema_{self.plan.best}", record.get(self.plan.best, math.nan))
        improved = score < self.best if self.plan.lower else score > self.best
        self.best = score if improved else self.best
        due = (epoch + 1) % self.plan.save_every == 0 or epoch + 1 == self.plan.epochs
        carried = self.carried() if due else None  # every process has its part of it
        if self.folder is None:
            return
        self.folder.log(record)
        folder = self.folder / "checkpoints"
        about = {**self.plan.about, "epoch": epoch + 1, self.plan.best: f"{score:.6g}"}
        averaged = self.raw if self.ema is None else self.ema.module
        if improved:
            save_weights(folder / "best.safetensors", averaged, about)
        if not due:
            return
        save_weights(folder / "last.safetensors", self.raw, about)
        if self.ema is not None:
            save_weights(folder / "last-ema.safetensors", self.ema.module, about)
        scaler = self.accelerator.scaler
        save_state(
            folder / "last-state.pt",
            {
                "epoch": epoch + 1,
                "step": self.step,
                "best": self.best,
                "model": self.raw.state_dict(),
                "ema": None if self.ema is None else self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "carried": carried,
            },
        )
