"""The main function of every script: parse options, evaluate or train, draw pictures."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from accelerate import Accelerator

from irpe.tools.plugins import import_plugins
from training import config as configuration
from training.data.digest import check_unchanged
from training.distributed import Sharded, from_main_process, make_accelerator
from training.errors import UserError, script
from training.loop import Loop
from training.optim import make_ema, make_schedule
from training.options import RANGES
from training.progress import Progress
from training.report import draw_curves, draw_tables, start_trackers
from training.run_directory import flat, open_run, read_records
from training.task import Context, Task
from training.weights import difference

_WARMUP = 0.2  # warm-up of runs that are shorter than their warm-up, as a fraction of the run


def main_of(
    kind: type, open_task: Callable[[Any, Accelerator], Task], prog: str
) -> Callable[..., int]:
    """Return the ``main(argv)`` of the script ``prog``."""

    @script
    def main(argv: Sequence[str] | None = None) -> None:
        config = configuration.parse(kind, argv, prog)
        import_plugins(config.plugins)
        start(config, open_task)

    return main


def start(config: Any, open_task: Callable[[Any, Accelerator], Task]) -> Any:
    """Evaluate or train; return the metrics, or the record of the last epoch."""
    values = flat(dataclasses.asdict(config))
    for problem, (fits, names) in RANGES.items():
        for name in names.split():
            if values.get(name) is not None and not fits(values[name]):
                raise UserError(f"{name}: {values[name]} {problem}")
    if config.eval_only and config.checkpoint is None and not values.get("model.pretrained"):
        raise UserError("eval_only needs checkpoint: FILE or model.pretrained: true")
    accelerator = make_accelerator(config.run)
    task = open_task(config, accelerator)
    task.model.to(accelerator.device)
    return task.report() if config.eval_only else train(task)


def train(task: Task) -> dict[str, Any]:
    """Train, write a run directory, and return the record of the last epoch."""
    begin = time.perf_counter()
    config, accelerator, model = task.config, task.accelerator, task.model
    main = accelerator.is_main_process
    if config.run.shard and accelerator.num_processes < 2:
        raise UserError(
            "run.shard: true needs several processes, and there is one; start them with "
            "torchrun --nproc_per_node=N"
        )
    sharded = Sharded(model, accelerator, config.run) if config.run.shard else None
    optimizer = task.optimizer(model if sharded is None else sharded.model)
    sched = config.sched
    if sched.warmup_epochs >= config.epochs:
        sched = dataclasses.replace(sched, warmup_epochs=config.epochs * _WARMUP)
        if main:
            print(
                f"note: sched.warmup_epochs: {config.sched.warmup_epochs:g} is not below epochs: "
                f"{config.epochs}; this run warms up for {sched.warmup_epochs:g}"
            )
    schedule, epochs = make_schedule(optimizer, sched, config.epochs, task.steps)
    ema = make_ema(model, config.ema)
    digest = from_main_process(accelerator, task.digest() if main else {})
    with open_run(accelerator, config, task.name) as (directory, state):
        if sharded is not None:
            trained, optimizer = sharded.model, accelerator.prepare(optimizer)
        else:
            if config.run.compile:
                model.compile()
            trained, optimizer = accelerator.prepare(model, optimizer)
        style = config.run.progress if main else "none"
        progress = Progress(task.steps * epochs, epochs, style, task.unit)
        if task.bad is not None:
            task.bad.say = progress.say
        if task.note:
            progress.say(task.note)
        context = Context(
            task=task,
            trained=trained,
            optimizer=optimizer,
            schedule=schedule,
            ema=ema,
            sharded=sharded,
            directory=directory,
            progress=progress,
            epochs=epochs,
            data=digest,
        )
        loop = Loop(context)
        if state is not None:
            _resume(loop, state)
        if directory is not None and config.run.trackers:
            options = flat(dataclasses.asdict(config))
            start_trackers(accelerator, config.run.trackers, directory.path, options)
        try:
            record = loop.fit()
        finally:
            progress.close()
            for tracker in accelerator.trackers:
                tracker.finish()
            _draw_curves(context)
        averaged = model if ema is None else ema.module
        task.finish(directory, averaged)
        skipped = {} if task.bad is None else task.bad.gather()
        if directory is not None:
            record = record or read_records(directory.path)[-1]
            if skipped:
                directory.write_json("skipped.json", skipped)
                path = directory / "skipped.json"
                print(f"{len(skipped)} images did not decode; {path} lists them")
            directory.update("finished", epoch=loop.epoch, step=loop.step, steps=loop.step)
            draw_tables(averaged, directory / "tables.png")
            seconds = time.perf_counter() - begin
            print(f"{task.verdict(record)}, after {epochs} epochs in {seconds:.0f} s")
            print(f"run directory: {directory.path}")
        return record


def _resume(loop: Loop, state: dict[str, Any]) -> None:
    """Check that the run has the same classes and data, and restore its state."""
    run, before = loop.context, state["carried"]
    say, main = run.progress.say, run.accelerator.is_main_process
    differing = difference(before["about"], run.task.about)
    if differing is not None:
        raise UserError(f"resume: the run was started with other classes: {differing}")
    check_unchanged(
        before["data"],
        run.data,
        allowed=run.config.allow_changed_data,
        say=run.progress.warn if main else lambda text: None,
    )
    if before["epochs"] != run.epochs:
        state["schedule"] = run.schedule.state_dict()
        say(
            f"the run is extended from {before['epochs']} to {run.epochs} epochs; the learning "
            f"rate is now that of a run of {run.epochs} epochs"
        )
    if run.directory is not None:
        run.directory.write_text("config.yaml", configuration.dump(run.config))
    loop.restore(state)
    within = f" and step {loop.step}" if loop.within else ""
    say(f"resuming after epoch {loop.epoch}{within}")


def _draw_curves(context: Context) -> None:
    """Draw ``curves.png``. Do not hide the error that ended the run."""
    directory = context.directory
    if directory is not None and (records := read_records(directory.path)):
        path = directory / "curves.png"
        try:
            draw_curves(records, path, directory.path.name, context.task.panels)
        except OSError as error:
            context.progress.warn(f"cannot write {str(path)!r}: {error.strerror}")
