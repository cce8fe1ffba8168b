"""The training loop: steps, evaluation, checkpoints and records, whatever the task.

A task gives three functions: the batches of an epoch, the loss of a batch, and the evaluation of a
model. Nothing random outlives a step: the generators are seeded from (seed, step, process). So a
run can be stopped after any step, and all that the next one depends on is in one state.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from training.errors import Stopped, UserError
from training.guards import FiniteGuard, gradient_norm, watched_loader
from training.keeping import Keeper
from training.peers import Peers
from training.plan import Plan, Step
from training.progress import Clock, Progress
from training.runfolder import RunFolder
from training.seeding import derive
from training.sharding import Sharded
from training.signals import Signals


class Loop:
    """Trains a model: ``raw`` as the task built it, ``model`` as accelerate prepared it.

    With ``sharded``, ``model`` is a sharded copy of ``raw``, which takes its weights when needed.

    ``epoch`` epochs are finished, ``within`` steps of the next one, ``step`` steps in all.
    """

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
        skipped: Callable[[], None] = lambda: None,
        sharded: Sharded | None = None,
    ) -> None:
        self.accelerator, self.raw, self.model = accelerator, raw, model
        self.optimizer, self.schedule, self.ema = optimizer, schedule, ema
        self.folder, self.plan, self.progress = folder, plan, progress
        self.carried, self.skipped, self.sharded = carried, skipped, sharded
        self.keeper = Keeper(
            accelerator, raw, optimizer, schedule, ema, folder, sharded,
            keep=plan.keep, patient=plan.patient, about=plan.about, warn=progress.warn,
        )  # fmt: skip
        warn = (lambda text: None) if folder is None else progress.warn  # once, not in each process
        live = raw if sharded is None else model
        self.guard = FiniteGuard(accelerator, live, folder, plan.max_skipped, plan.advice, warn)
        self.signals, self.peers = Signals(), Peers(accelerator)
        self.step = self.epoch = self.within = 0
        self.best = math.inf if plan.lower else -math.inf
        self.totals: dict[str, Tensor] = {}  # of this process and epoch: count and sums
        self.clock = Clock()  # of this epoch
        self._behind = False  # whether ``raw`` lacks the last steps of the sharded model
        self._agreed = 0  # the signal that all processes stop for after this step
        # Reading a number back stalls a GPU, so there it is not done at every step.
        self._look_every = 1 if self.guard.prompt else 10

    def fit(
        self,
        batches: Callable[[int, int], Iterator[Any]],
        loss: Callable[[nn.Module, Any, int], Step],
        evaluate: Callable[[list[nn.Module]], list[dict[str, float]]],
        describe: Callable[[dict[str, Any]], str],
    ) -> dict[str, Any]:
        """Train all epochs that are left; return the last one's record, {} if none is left.

        Args:
            batches: those of an epoch without the first so many; steps_per_epoch x accumulate
                of them with these.
            loss: ``loss(model, batch, step)``.
            evaluate: figures of each of several models, the same in every process.
            describe: one line for people from an epoch's record.

        Raises :class:`Stopped`, with a state saved, when a signal came.
        """
        record: dict[str, Any] = {}
        with self.signals, self.peers.watched():
            while self.epoch < self.plan.epochs:
                record = self._epoch(batches, loss, evaluate)
                rate, left = record[f"{self.progress.unit}_per_second"], self.progress.time_left
                pace = f"{rate:,.0f} {self.progress.unit}/s, {left} left"
                self.progress.say(f"{describe(record)}  |  {pace}")
        return record

    def restore(self, state: dict[str, Any]) -> None:
        """Go on after the step behind which ``state`` was written; before :meth:`fit`."""
        self.keeper.restore(state)
        self.epoch, self.within, self.step = state["epoch"], state["within"], state["step"]
        self.best, self.guard.skipped = state["best"], state["skipped"]
        self.clock = Clock(state["spent"])
        own, rows = self.accelerator.process_index, state["totals"]["rows"]
        if len(rows) != self.accelerator.num_processes:  # only their sum matters then
            rows = torch.cat(
                [rows.sum(0, keepdim=True), torch.zeros_like(rows[:1]).expand(own, -1)]
            )
        values = rows[own].to(self.accelerator.device)
        self.totals = dict(zip(state["totals"]["names"], values, strict=True))
        self.progress.skip(self.step)

    def _epoch(self, batches: Any, loss: Any, evaluate: Any) -> dict[str, Any]:
        """Train what is left of an epoch, evaluate, and keep what is due; return its record."""
        self.clock.start()
        models = [self.raw] if self.ema is None else [self.raw, self.ema.module]
        done = self.within * self.plan.accumulate
        trained = self._train_epoch(batches(self.epoch, done), loss)
        number, last = self.epoch + 1, self.epoch + 1 == self.plan.epochs
        cpu = self.clock.read()["train_cpu_seconds"]
        figures = []
        if number % self.plan.eval_every == 0 or last:
            position = self._position()  # an evaluation that is stopped has changed nothing
            self._gather()
            # Sharded, a state needs all processes, and they cannot agree within an evaluation.
            at_once = contextlib.nullcontext() if self.sharded else self.signals.at_once()
            try:
                with at_once:
                    figures = evaluate(models)
            except Stopped as stopped:
                self._stop(stopped.number, position, together=False)
        record = {
            "epoch": number,
            "step": self.step,
            "lr": self._rate,
            **{f"train_{name}": value for name, value in trained.items()},
        }
        if self.guard.skipped:
            record["skipped_steps"] = self.guard.skipped
        if figures:
            record.update(figures[0])
        for averaged in figures[1:]:
            record.update({f"ema_{name}": value for name, value in averaged.items()})
        pace = self.progress.pace * self.accelerator.num_processes
        record[f"{self.progress.unit}_per_second"] = round(pace, 1)
        record["train_cpu_seconds"] = round(cpu, 3)
        record["seconds"] = round(self.clock.read()["seconds"], 3)
        self.epoch, self.within, self.totals = number, 0, {}
        self.clock = Clock()
        self._keep(record)
        return record

    def _train_epoch(self, batches: Iterator[Any], loss: Any) -> dict[str, float]:
        """Run the steps that are left; return mean loss and figures of all processes."""
        self.model.train()
        self.progress.resume_clock()
        batches = watched_loader(batches)
        while self.within < self.plan.steps_per_epoch:
            self.schedule.step_update(self.step)
            count = self._one_step(batches, loss)
            self.step, self.within = self.step + 1, self.within + 1
            figures = self._figures() if self.step % self._look_every == 0 else None
            self.progress.step(self.epoch, count, figures)
            self._beat("running")
            stop = self._agreed if self.peers.several else self.signals.caught
            if stop:
                self._stop(stop, self._position(), together=True)
            if self.plan.save_steps and self.step % self.plan.save_steps == 0:
                self._save_state(self._position())
        self._figures()
        names = sorted(self.totals)
        if not names:
            raise UserError(
                f"all steps of epoch {self.epoch + 1} were left out; {self.plan.advice}"
            )
        summed = self.accelerator.reduce(torch.stack([self.totals[name] for name in names]), "sum")
        mean = dict(zip(names, summed.tolist(), strict=True))
        return {name: mean[name] / mean["count"] for name in names if name != "count"}

    def _one_step(self, batches: Iterator[Any], loss: Callable[..., Step]) -> int:
        """One optimiser step over ``accumulate`` batches; return this process's units."""
        count, sums = 0, dict[str, Tensor]()
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
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                result = loss(self.model, batch, self.step)
                self.accelerator.backward(result.loss / self.plan.accumulate)
            found = {"loss": result.loss.detach() * result.count, **result.sums}
            found["count"] = torch.tensor(result.count, device=result.loss.device)
            for name, value in found.items():
                sums[name] = sums.get(name, 0) + value.double()
            count += result.count if result.units is None else result.units
            self.guard.add(self.step + 1, result.loss, result.names, batch)
        self.guard.add_norm(gradient_norm(self.accelerator, self.model, self.plan.clip_grad))
        broken = self.guard.prompt and self.guard.broken
        self._agreed, broken = self.peers.any(self.signals.caught or 0, int(broken))
        if broken:
            self.guard.skip(self.epoch + 1, self.step + 1, self._rate)
            self.skipped()
        else:
            self.optimizer.step()
            for name, value in sums.items():
                self.totals[name] = self.totals.get(name, 0) + value
        self.optimizer.zero_grad()
        self._behind = True
        if self.ema is not None and not broken:
            self._gather()
            self.ema.update(self.raw, step=self.step)
        return count

    @property
    def _rate(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _figures(self) -> dict[str, str]:
        """Return the epoch's running means as text; end the run if something is not finite."""
        self.guard.look(self.epoch + 1, self.step, self._rate)
        count = float(self.totals.get("count", 0))
        means = {name: float(value) / count for name, value in self.totals.items() if count}
        return {
            name: f"{value:.3f}" if name.startswith("loss") else f"{100 * value:.1f} %"
            for name, value in means.items()
            if name != "count"
        }

    def _keep(self, record: dict[str, Any]) -> None:
        """Log the record and write what is due at the end of an epoch."""
        name, last = self.plan.best, self.epoch == self.plan.epochs
        score = record.get(f"ema_{name}", record.get(name, math.nan))
        improved = score < self.best if self.plan.lower else score > self.best
        self.best = score if improved else self.best
        due = last or self.epoch % self.plan.save_every == 0
        about = {"epoch": self.epoch, name: f"{score:.6g}"}
        # The state comes last: what is there when it is there belongs to it.
        self.keeper.log(record, must=last)
        if improved or due:
            self._gather()
        self.keeper.save_weights(about, improved, due, must=last)
        if due:
            self._save_state(self._position(), must=last)
        self._beat("running")

    def _gather(self) -> None:
        """Let ``raw`` have the weights of now, if they are sharded."""
        if self.sharded is not None and self._behind:
            self.sharded.gather()
            self._behind = False

    def _save_state(self, position: dict[str, Any], must: bool = False) -> None:
        self._gather()
        self.keeper.save_state(position, must=must)

    def _position(self) -> dict[str, Any]:
        """Return what a state holds beside weights; every process has its part of it."""
        self.guard.look(self.epoch + 1, self.step, self._rate)
        names = sorted(self.totals)
        rows = torch.zeros(self.accelerator.num_processes, 0)
        if names:
            own = torch.stack([self.totals[name] for name in names])
            rows = self.accelerator.gather(own[None]).cpu()
        return {
            "epoch": self.epoch,
            "within": self.within,
            "step": self.step,
            "best": self.best,
            "skipped": self.guard.skipped,
            "spent": self.clock.read(),
            "totals": {"names": names, "rows": rows},
            "carried": self.carried(),
        }

    def _stop(self, number: int, position: dict[str, Any], together: bool) -> NoReturn:
        """Save a state and raise :class:`Stopped`."""
        self._save_state(position)
        self._beat("stopped")
        if together:
            self.peers.any()  # a launcher may kill the others as soon as one has ended
        note = ""
        if self.folder is not None:
            note = (
                f" in epoch {self.epoch + 1}, after step {self.step}; the same command with "
                f"--resume {self.folder.path} (or auto) goes on from there"
            )
        raise Stopped(number, note)

    def _beat(self, status: str) -> None:
        if self.folder is not None:
            steps = self.plan.epochs * self.plan.steps_per_epoch
            self.folder.beat(status, epoch=self.epoch, step=self.step, steps=steps)
