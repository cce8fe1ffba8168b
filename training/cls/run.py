"""A classification run from its configuration to its folder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import irpe
from irpe.tools.weights import read_weights
from training import run
from training.badimages import BadImages
from training.cls.classify import Classify, line, verdict
from training.cls.model import build_model, check_name, input_settings
from training.cls.options import ClsConfig
from training.cls.sizes import Size, check_patches, measure_sizes, parse_sizes
from training.curves import CLASSIFIER
from training.data.loaders import make_loader
from training.data.seeded import SeededDataset, SeededStream
from training.data.sources import open_source
from training.data.transforms import make_transform
from training.engine import make_accelerator, per_process_batch
from training.errors import UserError
from training.optim import make_optimizer
from training.resume import open_folder
from training.seeding import derive
from training.weights import apply_weights


def evaluate(config: ClsConfig) -> list[dict[str, Any]]:
    """Evaluate ``config.checkpoint`` (or the pretrained weights), print and return its figures.

    With ``config.sizes``: at each of them, and leave a folder with the curve.
    """
    if config.checkpoint is None and not config.model.pretrained:
        raise UserError("eval_only needs checkpoint: FILE or model.pretrained: true")
    _check(config)
    accelerator = make_accelerator(config.run)
    source = _open(config, accelerator, training=False)
    model, settings, num_classes = _prepare_model(config, source)
    model.to(accelerator.device)
    bad = BadImages(config.data.on_bad_image, print)
    channels, *trained = settings["input_size"]

    def measure(size: Size) -> dict[str, float]:
        settings["input_size"] = (channels, *size)
        held_out = _loader(config, accelerator, settings, source, training=False)
        task = Classify(accelerator, (None, held_out), config.aug, num_classes, config.seed, bad)
        return task.evaluate([model])[0]

    if config.sizes is None:
        figures = measure((trained[0], trained[1]))
        if accelerator.is_main_process:
            print(verdict(figures))
        return [figures]
    sizes = parse_sizes(config.sizes)
    check_patches(model, sizes)
    name = f"{config.model.name}-{config.rpe or 'plain'}-sizes"
    folder, _ = open_folder(accelerator, replace(config, resume=None), name)
    return measure_sizes(sizes, (trained[0], trained[1]), measure, folder)


def train(config: ClsConfig) -> dict[str, Any]:
    """Train, leave a run folder, and return the last epoch's record."""
    _check(config)
    accelerator = make_accelerator(config.run)
    sources = tuple(_open(config, accelerator, training=part) for part in (True, False))
    _check_same_classes(*sources)
    model, settings, num_classes = _prepare_model(config, sources[0])
    loaders = (
        _loader(config, accelerator, settings, sources[0], training=True),
        _loader(config, accelerator, settings, sources[1], training=False),
    )
    model.to(accelerator.device)
    return run.train(
        config,
        accelerator,
        model,
        lambda model: make_optimizer(model, config.optim, config.batch_size),
        lambda say: Classify(
            accelerator,
            loaders,
            config.aug,
            num_classes,
            config.seed,
            BadImages(config.data.on_bad_image, say),
        ),
        name=f"{config.model.name}-{config.rpe or 'plain'}-seed{config.seed}",
        spec=config.rpe,
        steps=run.steps_per_epoch(
            len(loaders[0]),
            config.grad_accum_steps,
            config.batch_size,
            len(loaders[0].dataset),  # type: ignore[arg-type]
        ),
        best="top1",
        clip_grad=config.optim.clip_grad,
        about={"model": config.model.name, "rpe": config.rpe or "none"},
        advice="a lower optim.lr, a longer sched.warmup_epochs, optim.clip_grad: 1.0 or "
        "run.precision: fp32 may help",
        line=line,
        panels=CLASSIFIER,
        verdict=verdict,
    )


def _check(config: ClsConfig) -> None:
    """Raise for figures out of range, before anything is built."""
    run.check_numbers(config)
    if config.aug.repeats < 1:
        raise UserError(f"aug.repeats: {config.aug.repeats} is not at least 1")
    if config.sizes is not None:
        parse_sizes(config.sizes)
        if not config.eval_only:
            raise UserError(f"sizes: {config.sizes!r} needs eval_only: true; it does not train")
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
        world = 1 if training else accelerator.num_processes
        dataset = SeededStream(source, transform, config.seed, rank, world)
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
        repeats=config.aug.repeats if training else 1,
    )
