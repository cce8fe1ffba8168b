"""A run that says which package a text is from: its configuration to its folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator

from training import run
from training.badimages import BadImages
from training.cls.classify import Classify, line, verdict
from training.cls.options import AugConfig
from training.curves import CLASSIFIER
from training.data.loaders import Batch
from training.engine import make_accelerator, per_process_batch
from training.errors import UserError
from training.lm.model import build_classifier, encoding_name, specs
from training.lm.options import LmConfig
from training.optim import make_optimizer
from training.text.corpus import SPLITS, open_corpus
from training.text.excerpts import Excerpts, make_excerpts


class ExcerptLoader:
    """The batches of one process, with what :func:`training.data.loaders.set_epoch` asks for."""

    sampler = None

    def __init__(self, excerpts: Excerpts, batch_size: int, training: bool, **shares: int) -> None:
        self.dataset, self.excerpts = self, excerpts
        self.batch_size, self.training, self.shares = batch_size, training, shares
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.excerpts) // self.shares["shards"] // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        options = {"training": self.training, "epoch": self.epoch, **self.shares}
        for tokens, labels in self.excerpts.batches(self.batch_size, **options):  # type: ignore[arg-type]
            yield Batch(tokens, labels)


def evaluate(config: LmConfig) -> dict[str, float]:
    """Evaluate ``config.checkpoint``, print and return its figures."""
    if config.checkpoint is None:
        raise UserError("eval_only needs checkpoint: FILE")
    accelerator = make_accelerator(config.run)
    parts = _excerpts(config)
    task = _task(config, accelerator, parts)
    model = build_classifier(config, task.num_classes).to(accelerator.device)
    (figures,) = task.evaluate([model])
    if accelerator.is_main_process:
        print(verdict(figures))
    return figures


def train(config: LmConfig) -> dict[str, Any]:
    """Train, leave a run folder, and return the last epoch's record."""
    accelerator = make_accelerator(config.run)
    parts = _excerpts(config)
    task = _task(config, accelerator, parts)
    model = build_classifier(config, task.num_classes).to(accelerator.device)
    spec = encoding_name(config)
    return run.train(
        config,
        accelerator,
        model,
        lambda model: make_optimizer(model, config.optim, config.batch_size),
        lambda say: task,
        name=f"excerpts{config.excerpts.size}-{spec}-seed{config.seed}",
        spec=None,
        steps=run.steps_per_epoch(
            len(task.loaders[0]),  # type: ignore[arg-type]
            config.grad_accum_steps,
            config.batch_size,
            len(parts["train"]),
            "texts",
        ),
        best="top1",
        unit="texts",
        clip_grad=config.optim.clip_grad,
        about={
            "model": "classifier",
            "encoding": spec,
            "classes": " ".join(parts["train"].classes),
        },
        advice="a lower optim.lr or run.precision: fp32 may help",
        line=line,
        panels=CLASSIFIER,
        verdict=verdict,
    )


def _excerpts(config: LmConfig) -> dict[str, Excerpts]:
    """Cut all three splits, so that the classes are the same whichever is evaluated on."""
    run.check_numbers(config)
    if config.model.pretrained is not None:
        raise UserError("model.pretrained goes with task: questions, not excerpts")
    specs(config)
    options = config.excerpts
    return make_excerpts(
        {split: open_corpus(config.data, split) for split in SPLITS},
        options.size,
        min_files=options.min_files,
        per_class=options.per_class,
    )


def _task(config: LmConfig, accelerator: Accelerator, parts: dict[str, Excerpts]) -> Classify:
    shares = {"shard": accelerator.process_index, "shards": accelerator.num_processes}
    batch = per_process_batch(accelerator, config.batch_size, config.grad_accum_steps)
    loaders = (
        ExcerptLoader(parts["train"], batch, True, seed=config.seed, **shares),
        ExcerptLoader(parts[config.split], config.eval_batch_size, False, **shares),
    )
    plain = AugConfig(mixup=0.0, cutmix=0.0, smoothing=0.0)
    classes = len(parts["train"].classes)
    return Classify(accelerator, loaders, plain, classes, config.seed, BadImages("fail"))  # type: ignore[arg-type]
