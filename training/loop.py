"""The training loop: steps, evaluation, checkpoints and records, for any task.

Generators are seeded from (seed, step, process) at every step. So a run can be stopped after any
step, and a state needs no random state.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

from training.checks import FiniteCheck, gradient_norm
from training.distributed import Processes
from training.errors import Signals, Stopped, UserError
from training.progress import clock
from training.saving import Checkpointer
from training.seeding import derive
from training.task import Context

_CHECK_EVERY = 10  # steps between checks on a GPU, where each check synchronises


class Loop:
    """Trains the model of a context on its task."""

    def __init__(self, context: Context) -> None:
        self.context, self.task = context, context.task
        self.checkpoints, self.finite = Checkpointer(context), FiniteCheck(context)
        self.signals, self.processes = Signals(), Processes(context.accelerator)
        self.step = self.epoch = self.within = 0
        self.best = math.inf if self.task.lower else -math.inf
        self.totals: dict[str, Tensor] = {}  # count and sums of this process in this epoch
        self.spent = [0.0, 0.0]  # clock() of this epoch before the run was resumed
        self._begin = clock()
        self._stale = False  # whether the sharded model has newer weights than the whole model
        self._stop_signal = 0  # the signal after which all processes stop

    def fit(self) -> dict[str, Any]:
        """Train all remaining epochs.

        Returns:
            The record of the last epoch; {} if no epoch remains.

        Raises:
            Stopped: after a signal, when a state is saved.
        """
        record: dict[str, Any] = {}
        progress = self.context.progress
        with self.signals, self.processes.watched():
            while self.epoch < self.context.epochs:
                record = self._epoch()
                rate, left = record[f"{progress.unit}_per_second"], progress.time_left
                pace = f"{rate:,.0f} {progress.unit}/s, {left} left"
                progress.say(f"{self.task.describe(record, self.context.epochs)}  |  {pace}")
        return record

    def restore(self, state: dict[str, Any]) -> None:
        """Resume after the step at which ``state`` was saved; call it before :meth:`fit`."""
        accelerator, carried = self.context.accelerator, state["carried"]
        self.checkpoints.restore(state)
        self.task.restore(carried["task"])
        if self.task.bad is not None:
            self.task.bad.seen.update(carried["bad"])
        self.epoch, self.within, self.step = state["epoch"], state["within"], state["step"]
        self.best, self.finite.skipped = state["best"], state["skipped"]
        self.spent = state["spent"]
        own, rows = accelerator.process_index, state["totals"]["rows"]
        if len(rows) != accelerator.num_processes:  # process 0 gets the sum
            rows = torch.cat(
                [rows.sum(0, keepdim=True), torch.zeros_like(rows[:1]).expand(own, -1)]
            )
        values = rows[own].to(accelerator.device)
        self.totals = dict(zip(state["totals"]["names"], values, strict=True))
        self.context.progress.skip(self.step)

    def _epoch(self) -> dict[str, Any]:
        """Train the rest of an epoch, evaluate, and save; return its record."""
        run = self.context
        self._begin = clock()
        trained = self._train_epoch()
        number = self.epoch + 1
        cpu = self._time()[1]
        metrics = []
        if number % run.config.run.eval_every == 0 or number == run.epochs:
            metrics = self._evaluate()
        record = {
            "epoch": number,
            "step": self.step,
            "lr": run.learning_rate,
            **{f"train_{name}": value for name, value in trained.items()},
        }
        if self.finite.skipped:
            record["skipped_steps"] = self.finite.skipped
        if metrics:
            record.update(metrics[0])
        for averaged in metrics[1:]:
            record.update({f"ema_{name}": value for name, value in averaged.items()})
        pace = run.progress.pace * run.accelerator.num_processes
        record[f"{run.progress.unit}_per_second"] = round(pace, 1)
        record["train_cpu_seconds"] = round(cpu, 3)
        record["seconds"] = round(self._time()[0], 3)
        self.epoch, self.within, self.totals = number, 0, {}
        self.spent, self._begin = [0.0, 0.0], clock()
        self._save(record)
        return record

    def _evaluate(self) -> list[dict[str, Any]]:
        """Return the metrics of the model and of its averaged weights."""
        run = self.context
        position = self._position()  # evaluation changes no state, so signals may interrupt it
        self._gather()
        models = [run.model] if run.ema is None else [run.model, run.ema.module]
        # With sharding, saving a state needs all processes, which cannot agree while evaluating.
        at_once = contextlib.nullcontext() if run.sharded else self.signals.at_once()
        try:
            with at_once:
                return self.task.evaluate(models)
        except Stopped as stopped:
            self._stop(stopped.number, position, together=False)

    def _train_epoch(self) -> dict[str, float]:
        """Run the remaining steps; return mean loss and metrics over all processes."""
        run, every = self.context, 1 if self.finite.every_step else _CHECK_EVERY
        accumulate, save_steps = run.config.grad_accum_steps, run.config.run.save_steps
        batches = self.task.batches(self.epoch, self.within * accumulate)
        run.trained.train()
        run.progress.resume_clock()
        while self.within < self.task.steps:
            run.schedule.step_update(self.step)
            count = self._one_step(batches)
            self.step, self.within = self.step + 1, self.within + 1
            run.progress.step(self.epoch, count, self._means() if self.step % every == 0 else None)
            self._update("running")
            stop = self._stop_signal if self.processes.several else self.signals.caught
            if stop:
                self._stop(stop, self._position(), together=True)
            if save_steps and self.step % save_steps == 0:
                self._save_state(self._position())
        self.finite.check(self.epoch + 1, self.step)
        names = sorted(self.totals)
        if not names:
            raise UserError(f"all steps of epoch {self.epoch + 1} were skipped; {self.task.advice}")
        summed = run.accelerator.reduce(torch.stack([self.totals[name] for name in names]), "sum")
        mean = dict(zip(names, summed.tolist(), strict=True))
        return {name: mean[name] / mean["count"] for name in names if name != "count"}

    def _one_step(self, batches: Iterator[Any]) -> int:
        """Run one optimiser step over the accumulated batches; return this process's units."""
        run, accelerator = self.context, self.context.accelerator
        accumulate = run.config.grad_accum_steps
        count, sums = 0, dict[str, Tensor]()
        for part in range(accumulate):
            torch.manual_seed(
                derive(run.config.seed, "step", self.step, part, accelerator.process_index)
            )
            try:
                batch = next(batches)
            except StopIteration:
                raise UserError(
                    f"the data ended after {self.step} steps, before the end of the epoch: "
                    "the data set is shorter than its length"
                ) from None
            last = part == accumulate - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(run.trained):
                result = self.task.loss(run.trained, batch, self.step)
                accelerator.backward(result.loss / accumulate)
            found = {"loss": result.loss.detach() * result.count, **result.sums}
            found["count"] = torch.tensor(result.count, device=result.loss.device)
            for name, value in found.items():
                sums[name] = sums.get(name, 0) + value.double()
            count += result.count if result.units is None else result.units
            self.finite.add(self.step + 1, result.loss, result.names, batch)
        self.finite.add_norm(gradient_norm(accelerator, run.trained, self.task.clip_grad))
        failed = self.finite.every_step and self.finite.failed
        self._stop_signal, failed = self.processes.max(self.signals.caught or 0, int(failed))
        if failed:
            self.finite.skip(self.epoch + 1, self.step + 1)
            self.task.skipped()
        else:
            run.optimizer.step()
            for name, value in sums.items():
                self.totals[name] = self.totals.get(name, 0) + value
        run.optimizer.zero_grad()
        self._stale = True
        if run.ema is not None and not failed:
            self._gather()
            run.ema.update(run.model, step=self.step)
        return count

    def _time(self) -> list[float]:
        """Return the seconds and CPU seconds of this epoch."""
        parts = zip(clock(), self._begin, self.spent, strict=True)
        return [now - begin + spent for now, begin, spent in parts]

    def _means(self) -> dict[str, str]:
        """Return the epoch's running means as text; end the run if a number is not finite."""
        self.finite.check(self.epoch + 1, self.step)
        count = float(self.totals.get("count", 0))
        means = {name: float(value) / count for name, value in self.totals.items() if count}
        return {
            name: f"{value:.3f}" if name.startswith("loss") else f"{100 * value:.1f} %"
            for name, value in means.items()
            if name != "count"
        }

    def _save(self, record: dict[str, Any]) -> None:
        """Log the record and write the files of the end of an epoch."""
        run, last = self.context, self.epoch == self.context.epochs
        best = self.task.best
        score = record.get(f"ema_{best}", record.get(best, math.nan))
        improved = score < self.best if self.task.lower else score > self.best
        self.best = score if improved else self.best
        due = last or self.epoch % run.config.run.save_every == 0
        about = {"epoch": self.epoch, best: f"{score:.6g}"}
        # Write the state last, so that a resumed run has all other files.
        if run.directory is not None:
            self.checkpoints.attempt(lambda: run.directory.log(record), last)
        run.accelerator.log(record, step=self.step)
        if improved or due:
            self._gather()
        self.checkpoints.save_weights(about, improved, due, must=last)
        if due:
            self._save_state(self._position(), must=last)
        self._update("running")

    def _gather(self) -> None:
        """Update the whole model from the sharded weights."""
        if self.context.sharded is not None and self._stale:
            self.context.sharded.gather()
            self._stale = False

    def _save_state(self, position: dict[str, Any], must: bool = False) -> None:
        self._gather()
        self.checkpoints.save_state(position, must=must)

    def _position(self) -> dict[str, Any]:
        """Return the parts of a state besides weights and optimiser; all processes must call it."""
        run, names = self.context, sorted(self.totals)
        self.finite.check(self.epoch + 1, self.step)
        rows = torch.zeros(run.accelerator.num_processes, 0)
        if names:
            own = torch.stack([self.totals[name] for name in names])
            rows = run.accelerator.gather(own[None]).cpu()
        return {
            "epoch": self.epoch,
            "within": self.within,
            "step": self.step,
            "best": self.best,
            "skipped": self.finite.skipped,
            "spent": self._time(),
            "totals": {"names": names, "rows": rows},
            "carried": {
                "task": self.task.carried(),
                "bad": {} if self.task.bad is None else self.task.bad.gather(),
                "about": self.task.about,
                "data": run.data,
                "epochs": run.epochs,
            },
        }

    def _stop(self, number: int, position: dict[str, Any], together: bool) -> NoReturn:
        """Save a state and raise :class:`Stopped`."""
        self._save_state(position)
        self._update("stopped")
        if together:
            self.processes.max()  # wait: launchers kill the other processes when one ends
        note, directory = "", self.context.directory
        if directory is not None:
            note = (
                f" in epoch {self.epoch + 1}, after step {self.step}; resume it by the same "
                f"command with --resume {directory.path} (or auto)"
            )
        raise Stopped(number, note)

    def _update(self, status: str) -> None:
        run = self.context
        if run.directory is not None:
            steps = run.epochs * self.task.steps
            run.directory.update(status, epoch=self.epoch, step=self.step, steps=steps)
