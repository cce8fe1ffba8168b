"""A classification run from its configuration to its folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import irpe
from training import config as configuration
from training.badimages import BadImages
from training.classify import Classify
from training.cls_model import build_model, check_name, input_settings
from training.cls_options import ClsConfig
from training.curves import draw_curves
from training.data.loaders import make_loader
from training.data.seeded import SeededDataset, SeededStream
from training.data.sources import open_source
from training.data.transforms import make_transform
from training.engine import from_main_process, make_accelerator, per_process_batch
from training.errors import UserError
from training.loop import Loop, Plan
from training.optim import make_ema, make_optimizer, make_schedule
from training.pictures import draw_tables
from training.progress import Progress
from training.runfolder import RunFolder
from training.seeding import derive
from training.weights import apply_weights, read_weights


def evaluate(config: ClsConfig) -> dict[str, float]:
    """Evaluate ``config.checkpoint`` (or the pretrained weights), print and return its figures."""
    if config.checkpoint is None and not config.model.pretrained:
        raise UserError("eval_only needs checkpoint: FILE or model.pretrained: true")
    _check(config)
    accelerator = make_accelerator(config.run)
    source = _open(config, accelerator, training=False)
    model, settings, num_classes = _prepare_model(config, source)
    held_out = _loader(config, accelerator, settings, source, training=False)
    bad = BadImages(config.data.on_bad_image, print)
    task = Classify(accelerator, (None, held_out), config.aug, num_classes, config.seed, bad)
    (figures,) = task.evaluate([model.to(accelerator.device)])
    if accelerator.is_main_process:
        print(_verdict(figures))
    return figures


def train(config: ClsConfig) -> dict[str, Any]:
    """Train, leave a run folder, and return the last epoch's record."""
    start = time.perf_counter()
    _check(config)
    accelerator = make_accelerator(config.run)
    sources = tuple(_open(config, accelerator, training=part) for part in (True, False))
    _check_same_classes(*sources)
    model, settings, num_classes = _prepare_model(config, sources[0])
    loaders = (
        _loader(config, accelerator, settings, sources[0], training=True),
        _loader(config, accelerator, settings, sources[1], training=False),
    )
    steps = len(loaders[0]) // config.grad_accum_steps
    if not steps:
        raise UserError(
            f"batch_size: {config.batch_size} is more than the "
            f"{len(loaders[0].dataset)} training images"  # type: ignore[arg-type]
        )
    model.to(accelerator.device)
    optimizer = make_optimizer(model, config.optim, config.batch_size)
    schedule, epochs = make_schedule(optimizer, config.sched, config.epochs, steps)
    ema = make_ema(model, config.ema)
    folder = _folder(config, accelerator)
    if config.run.compile:
        model.compile()
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    style = config.run.progress if accelerator.is_main_process else "none"
    progress = Progress(steps * epochs, epochs, style)
    bad = BadImages(config.data.on_bad_image, progress.say)
    task = Classify(accelerator, loaders, config.aug, num_classes, config.seed, bad)
    plan = Plan(
        epochs=epochs,
        steps_per_epoch=steps,
        accumulate=config.grad_accum_steps,
        clip_grad=config.optim.clip_grad,
        save_every=config.run.save_every,
        seed=config.seed,
        about={"model": config.model.name, "rpe": config.rpe or "none"},
    )
    loop = Loop(accelerator, model, wrapped, optimizer, schedule, ema, folder, plan, progress)
    try:
        record = loop.fit(task.batches, task.loss, task.evaluate, _epoch_line(epochs))
    finally:
        progress.close()
        if folder is not None and folder.records():
            draw_curves(folder.records(), folder / "curves.png", folder.path.name)
    skipped = bad.gather()
    if folder is not None:
        averaged = model if ema is None else ema.module
        draw_tables(averaged, folder / "tables.png", config.rpe)
        if skipped:
            folder.write_json("skipped.json", skipped)
            print(f"{len(skipped)} images did not decode; {folder / 'skipped.json'} names them")
        seconds = time.perf_counter() - start
        print(f"{_verdict(record)}, after {epochs} epochs in {seconds:.0f} s")
        print(f"run folder: {folder.path}")
    return record


def _check(config: ClsConfig) -> None:
    """Raise for figures out of range, before anything is built."""
    for name in ("epochs", "batch_size", "grad_accum_steps"):
        if getattr(config, name) < 1:
            raise UserError(f"{name}: {getattr(config, name)} is not at least 1")
    if config.run.save_every < 1:
        raise UserError(f"run.save_every: {config.run.save_every} is not at least 1")
    if config.data.workers < 0:
        raise UserError(f"data.workers: {config.data.workers} is negative")
    # Before the data set is opened: these two are quick to tell.
    check_name(config.model.name)
    if config.rpe is not None:
        irpe.parse(config.rpe)


def _prepare_model(config: ClsConfig, source: Any) -> tuple[nn.Module, dict[str, Any], int]:
    """Build the model with the data set's classes and load ``config.checkpoint`` into it."""
    num_classes = config.model.num_classes or len(getattr(source, "classes", None) or ())
    if not num_classes:
        raise UserError(
            f"data set {config.data.name!r} does not say how many classes it has; "
            "set model.num_classes"
        )
    torch.manual_seed(derive(config.seed, "model"))
    model = build_model(config, num_classes)
    if config.checkpoint is not None:
        apply_weights(model, read_weights(config.checkpoint), config.checkpoint)
    return model, input_settings(config, model), num_classes


def _open(config: ClsConfig, accelerator: Accelerator, *, training: bool) -> Any:
    data = config.data
    return open_source(
        data.name,
        data.root,
        data.train_split if training else data.val_split,
        training=training,
        in_chans=config.model.in_chans,
        # Streams deal out whole batches of one process.
        batch_size=per_process_batch(accelerator, config.batch_size, config.grad_accum_steps),
        seed=config.seed,
        class_map=data.class_map,
        download=data.download,
        kwargs=data.kwargs,
    )


def _check_same_classes(train: Any, held_out: Any) -> None:
    """Raise where the two splits number their classes differently."""
    ours, theirs = (getattr(source, "classes", None) for source in (train, held_out))
    if ours is None or theirs is None or ours == theirs:
        return
    lacking = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
    raise UserError(
        "the training and the held-out images are of different classes: "
        f"only in training: {', '.join(lacking[0][:8]) or 'none'}; "
        f"only held out: {', '.join(lacking[1][:8]) or 'none'}; "
        "data.class_map can number them alike"
    )


def _loader(
    config: ClsConfig,
    accelerator: Accelerator,
    settings: dict[str, Any],
    source: Any,
    *,
    training: bool,
) -> DataLoader:
    batch = per_process_batch(accelerator, config.batch_size, config.grad_accum_steps)
    if not training:
        batch = config.eval_batch_size or batch
    elif (config.aug.mixup > 0 or config.aug.cutmix > 0) and batch % 2:
        raise UserError(f"batch_size: mixing needs an even batch per forward pass, not {batch}")
    transform = make_transform(config.aug, settings, training=training)
    rank = accelerator.process_index
    dataset: SeededDataset | SeededStream
    if isinstance(source, IterableDataset):
        dataset = SeededStream(source, transform, config.seed, rank)
    else:
        dataset = SeededDataset(source, transform, config.seed, replace=training)
    return make_loader(
        dataset,
        batch_size=batch,
        training=training,
        seed=config.seed,
        workers=config.data.workers,
        rank=rank,
        world=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
    )


def _folder(config: ClsConfig, accelerator: Accelerator) -> RunFolder | None:
    """Make the run folder on the main process; an error there is an error everywhere."""
    name = config.run.experiment
    if name is None:
        name = f"{config.model.name}-{config.rpe or 'plain'}-seed{config.seed}"
        name = name.replace("/", "_").replace(":", "_")
    folder, problem = None, None
    if accelerator.is_main_process:
        try:
            folder = RunFolder(config.run.output, name)
            folder.write_text("config.yaml", configuration.dump(config))
        except UserError as error:
            problem = str(error)
    problem = from_main_process(accelerator, problem)
    if problem is not None:
        raise UserError(problem)
    return folder


def _verdict(figures: dict[str, Any]) -> str:
    prefix = "ema_" if "ema_top1" in figures else ""
    top1, count = figures[f"{prefix}top1"], figures[f"{prefix}count"]
    wrong = count - round(top1 * count)
    return f"held-out accuracy {100 * top1:.2f} % ({wrong} of {count} wrong)"


def _epoch_line(epochs: int) -> Callable[[dict[str, Any]], str]:
    width = len(str(epochs))

    def line(record: dict[str, Any]) -> str:
        parts = [
            f"epoch {record['epoch']:{width}}/{epochs}",
            f"train loss {record['train_loss']:.3f}, accuracy {100 * record['train_top1']:5.2f} %",
            f"held out loss {record['loss']:.3f}, accuracy {100 * record['top1']:5.2f} %",
        ]
        if "ema_top1" in record:
            parts.append(f"averaged weights {100 * record['ema_top1']:5.2f} %")
        return "  |  ".join(parts)

    return line
