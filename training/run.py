"""What every training script does around its task: folder, schedule, loop, pictures, verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from training.badimages import BadImages
from training.curves import Panel, draw_curves
from training.errors import UserError
from training.loop import Loop
from training.optim import make_ema, make_schedule
from training.pictures import draw_tables
from training.plan import Plan, Step
from training.progress import Progress
from training.resume import open_folder
from training.runfolder import RunFolder
from training.sharding import Sharded, check_sharding


class Task:
    """What a script trains: the batches of an epoch, the loss of one, and the evaluation.

    Attributes:
        bad: images that did not decode; None for a task without images.
    """

    bad: BadImages | None = None

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Any, step: int) -> Step:
        raise NotImplementedError

    def evaluate(self, models: list[nn.Module]) -> list[dict[str, Any]]:
        raise NotImplementedError

    def carried(self) -> Any:
        """What the next step depends on besides the weights; it is written with a state."""
        return None

    def restore(self, carried: Any) -> None:
        """Go on from what :meth:`carried` returned, in a run that is resumed."""

    def skipped(self) -> None:
        """Forget what the last step left, as it was not finite."""


def train(
    config: Any,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
    task_of: Callable[[Callable[[str], None]], Task],
    *,
    name: str,
    spec: Any,
    steps: int,
    best: str,
    lower: bool = False,
    unit: str = "images",
    clip_grad: float | None,
    about: dict[str, Any],
    advice: str,
    line: Callable[[dict[str, Any], int], str],
    panels: Sequence[Panel],
    verdict: Callable[[dict[str, Any]], str],
    finish: Callable[[Any, RunFolder | None, nn.Module], None] = lambda *given: None,
) -> dict[str, Any]:
    """Train ``model`` on what ``config`` says and leave a run folder.

    Args:
        config: of a script: has epochs, seed, resume, grad_accum_steps, sched, ema, run.
        optimizer_of: makes the optimiser of a model: this one, or its sharded copy.
        task_of: makes the task from a function that prints a line for people.
        model: on the accelerator's device. name: of the folder. spec: of the model's encoding,
            None without one. steps: of an epoch. best: the figure that decides which
            checkpoint is the best, the highest or, with ``lower``, the lowest. unit: of the
            pace. line: of an epoch, from its record and the number of epochs.
    """
    start = time.perf_counter()
    check_sharding(config.run, accelerator.num_processes)
    sharded = Sharded(model, accelerator, config.run) if config.run.shard else None
    optimizer = optimizer_of(model if sharded is None else sharded.model)
    schedule, epochs = make_schedule(optimizer, config.sched, config.epochs, steps)
    ema = make_ema(model, config.ema)
    folder, state = open_folder(accelerator, config, name)
    if sharded is not None:
        wrapped, optimizer = sharded.model, accelerator.prepare(optimizer)
    else:
        if config.run.compile:
            model.compile()
        wrapped, optimizer = accelerator.prepare(model, optimizer)
    style = config.run.progress if accelerator.is_main_process else "none"
    progress = Progress(steps * epochs, epochs, style, unit)
    task = task_of(progress.say)
    plan = Plan(
        epochs=epochs,
        steps_per_epoch=steps,
        accumulate=config.grad_accum_steps,
        clip_grad=clip_grad,
        save_every=config.run.save_every,
        save_steps=config.run.save_steps,
        keep=config.run.keep,
        patient=config.run.on_save_error == "continue",
        max_skipped=config.run.max_skipped,
        seed=config.seed,
        eval_every=config.run.eval_every,
        best=best,
        lower=lower,
        advice=advice,
        about=about,
    )

    def carried() -> dict[str, Any]:
        bad = {} if task.bad is None else task.bad.gather()
        return {"task": task.carried(), "bad": bad}

    loop = Loop(
        accelerator, model, wrapped, optimizer, schedule, ema, folder, plan, progress,
        carried, task.skipped, sharded,
    )  # fmt: skip
    if state is not None:
        loop.restore(state)
        task.restore(state["carried"]["task"])
        if task.bad is not None:
            task.bad.restore(state["carried"]["bad"])
        within = f" and step {loop.step}" if loop.within else ""
        progress.say(f"going on after epoch {loop.epoch}{within}")
    try:
        record = loop.fit(
            task.batches, task.loss, task.evaluate, lambda record: line(record, epochs)
        )
    finally:
        progress.close()
        if folder is not None and folder.records():
            try:
                draw_curves(folder.records(), folder / "curves.png", folder.path.name, panels)
            except OSError as error:  # what ended the run is what must be told
                progress.warn(f"cannot write {str(folder / 'curves.png')!r}: {error.strerror}")
    if folder is not None:
        record = record or folder.records()[-1]
    averaged = model if ema is None else ema.module
    finish(task, folder, averaged)
    skipped = {} if task.bad is None else task.bad.gather()
    if folder is not None:
        draw_tables(averaged, folder / "tables.png", spec)
        if skipped:
            folder.write_json("skipped.json", skipped)
            print(f"{len(skipped)} images did not decode; {folder / 'skipped.json'} names them")
        folder.beat("finished", epoch=loop.epoch, step=loop.step, steps=loop.step)
        seconds = time.perf_counter() - start
        print(f"{verdict(record)}, after {epochs} epochs in {seconds:.0f} s")
        print(f"run folder: {folder.path}")
    return record


def steps_per_epoch(
    batches: int, accumulate: int, batch_size: int, samples: int, what: str = "images"
) -> int:
    """Optimiser steps of an epoch of ``batches`` batches; at least one."""
    if not batches // accumulate:
        raise UserError(f"batch_size: {batch_size} is more than the {samples} training {what}")
    return batches // accumulate


def check_numbers(config: Any) -> None:
    """Raise for figures of any script that are out of range."""
    for name in ("epochs", "batch_size", "grad_accum_steps"):
        if getattr(config, name) < 1:
            raise UserError(f"{name}: {getattr(config, name)} is not at least 1")
    for name in ("save_every", "eval_every", "save_steps", "keep"):
        value = getattr(config.run, name)
        if value is not None and value < 1:
            raise UserError(f"run.{name}: {getattr(config.run, name)} is not at least 1")
    if config.run.max_skipped < 0:
        raise UserError(f"run.max_skipped: {config.run.max_skipped} is negative")
    if getattr(config.data, "workers", 0) < 0:
        raise UserError(f"data.workers: {config.data.workers} is negative")
