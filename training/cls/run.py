"""Open the data and the model of train_cls.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from PIL import ImageOps
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchvision import transforms as tv

import irpe
from training.cls.classify import Classify
from training.cls.model import (
    build_model,
    check_memory,
    check_name,
    input_settings,
    make_transform,
)
from training.cls.options import ClsConfig
from training.cls.sizes import Size, check_patches, measure_sizes, parse_sizes
from training.data.classes import ClassFolder
from training.data.digest import Digest
from training.data.seeded import BadImages, SeededDataset, SeededStream
from training.data.sources import data_digest, open_source
from training.distributed import per_process_batch
from training.errors import UserError
from training.run_directory import open_run
from training.seeding import derive
from training.task import loader_of
from training.weights import check_same_classes, identity, start_from


def open_task(config: ClsConfig, accelerator: Accelerator) -> ImageClassify:
    """Check the options, and open the images and the model."""
    if config.sizes is not None:
        parse_sizes(config.sizes)
    check_name(config.model.name)
    if config.rpe is not None:
        irpe.parse(config.rpe)
    parts = (False,) if config.eval_only else (True, False)
    sources = [_open(config, accelerator, training=part) for part in parts]
    return ImageClassify(config, accelerator, sources)


class ImageClassify(Classify):
    """Training and evaluation of a classifier of images."""

    def __init__(self, config: ClsConfig, accelerator: Accelerator, sources: list[Any]) -> None:
        if len(sources) > 1:
            train, held_out = sources
            if isinstance(train, ClassFolder) and train.files() == held_out.files():
                raise UserError(
                    f"data.root: {train.root!r} has the same images for training and evaluation; "
                    "put them into folders train and val"
                )
            check_same_classes(*(getattr(source, "classes", None) for source in sources))
        classes = identity(getattr(sources[0], "classes", None))
        model, self.settings, num_classes = _prepare_model(config, sources[0], classes)
        self.trained: Size = self.settings["input_size"][1:]
        loaders = [
            _loader(config, accelerator, self.settings, source, training=source is not sources[-1])
            for source in sources
        ]
        check_memory(config, model, self.trained, loaders[0].batch_size, accelerator.device)
        super().__init__(
            config.aug,
            num_classes,
            sources,
            loaders,
            BadImages(config.data.on_bad_image),
            config,
            accelerator,
            model,
            f"{config.model.name}-{config.rpe or 'plain'}-seed{config.seed}",
            {"model": config.model.name, "rpe": config.rpe or "none", **classes},
        )

    def report(self) -> list[dict[str, Any]]:
        """Evaluate at the training size, or at each of ``config.sizes`` with a curve."""
        config, accelerator = self.config, self.accelerator
        if config.sizes is None:
            return [super().report()]
        sizes = parse_sizes(config.sizes)
        check_patches(self.model, sizes)
        name = f"{config.model.name}-{config.rpe or 'plain'}-sizes"
        with open_run(accelerator, replace(config, resume=None), name) as (folder, _):
            return measure_sizes(sizes, self.trained, self._measure, folder)

    def _measure(self, size: Size) -> dict[str, float]:
        config, accelerator = self.config, self.accelerator
        self.settings["input_size"] = (self.settings["input_size"][0], *size)
        held_out = _loader(config, accelerator, self.settings, self.sources[-1], training=False)
        self.loaders = [None, held_out]
        check_memory(config, self.model, size, held_out.batch_size, accelerator.device)
        return self.evaluate([self.model])[0]

    def digest(self) -> Digest:
        return data_digest(self.sources, self.config.data.root)


def _prepare_model(
    config: ClsConfig, source: Any, classes: dict[str, str]
) -> tuple[nn.Module, dict[str, Any], int]:
    """Build the model with the data set's classes and load ``config.checkpoint`` into it."""
    num_classes = config.model.num_classes or len(getattr(source, "classes", None) or ())
    if not num_classes:
        raise UserError(
            f"data set {config.data.name!r} does not have a number of classes; "
            "set model.num_classes"
        )
    torch.manual_seed(derive(config.seed, "model"))
    model = build_model(config, num_classes)
    if config.checkpoint is not None:
        heads = model.get_classifier()
        heads = heads if isinstance(heads, tuple | list) else (heads,)
        start_from(model, config.checkpoint, classes, heads, training=not config.eval_only)
    settings = input_settings(config, model)
    # Weights files contain the model's configuration with the preparation of its images.
    model.pretrained_cfg = {**model.pretrained_cfg, **settings}
    return model, settings, num_classes


def _open(config: ClsConfig, accelerator: Accelerator, *, training: bool) -> Any:
    data = config.data
    return open_source(
        data.name,
        data.root,
        data.train_split if training else data.val_split,
        training=training,
        in_chans=config.model.in_chans,
        # For streams, which return whole batches to each process.
        batch_size=per_process_batch(accelerator, config.batch_size, config.grad_accum_steps),
        seed=config.seed,
        **{name: getattr(data, name) for name in ("class_map", "download", "exif", "kwargs")},
    )


def _loader(
    config: ClsConfig,
    accelerator: Accelerator,
    settings: dict[str, Any],
    source: Any,
    *,
    training: bool,
) -> DataLoader:
    transform = make_transform(config.aug, settings, training=training)
    dataset: SeededDataset | SeededStream
    if isinstance(source, IterableDataset):
        world = 1 if training else accelerator.num_processes
        if config.data.exif:
            transform = tv.Compose([ImageOps.exif_transpose, transform])
        dataset = SeededStream(source, transform, config.seed, accelerator.process_index, world)
    else:
        dataset = SeededDataset(source, transform, config.seed, replace=training)
    repeats = config.aug.repeats if training else 1
    loader = loader_of(config, accelerator, dataset, training=training, repeats=repeats)
    mixed = training and (config.aug.mixup > 0 or config.aug.cutmix > 0)
    if mixed and loader.batch_size % 2:
        raise UserError(
            f"batch_size: mixing needs an even batch per forward pass, not {loader.batch_size}"
        )
    return loader
