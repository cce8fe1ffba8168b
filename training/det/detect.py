"""The task of train_det.py: data, DETR's loss, COCO's evaluation, and files of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.ops import box_convert
from torchvision.transforms.functional import pil_to_tensor

from models.detr import DETR, Criterion, HungarianMatcher, detections
from training.data.coco import CocoSource, open_coco
from training.data.detection import (
    DetectionBatch,
    DetectionDataset,
    collate_detection,
    make_transform,
)
from training.data.digest import Digest
from training.data.scenes import make_scenes, scene_paths
from training.data.seeded import BadImage, BadImages
from training.det.average_precision import BoxEvaluation
from training.det.model import build_model, make_optimizer
from training.det.options import DetConfig
from training.det.pictures import Example, draw_detections, draw_precision_recall
from training.errors import UserError
from training.report import DETECTOR
from training.run_directory import RunDirectory
from training.task import ImageTask, Step, evaluating, loader_of
from training.weights import check_same_classes, identity

PARTS = ("loss_ce", "loss_bbox", "loss_giou")
SCENES = "data/digits-detection"


def open_task(config: DetConfig, accelerator: Accelerator) -> Detect:
    """Open the images and the model."""
    sched = dataclasses.replace(config.sched, decay_epochs=config.lr_drop)
    config = dataclasses.replace(config, sched=sched)
    splits = ("validation",) if config.eval_only else ("train", "validation")
    sources = [_open(config, split) for split in splits]
    check_same_classes(sources[0].categories, sources[-1].categories)
    loaders = []
    for source in sources:
        training = source is not sources[-1]
        transform = make_transform(config.aug, training=training)
        dataset = DetectionDataset(source, transform, config.seed, replace=training)
        more = {"training": training, "collate": collate_detection}
        loaders.append(loader_of(config, accelerator, dataset, **more))
    model = build_model(config, sources[0].categories)
    return Detect(config, accelerator, model, loaders, sources)


class Detect(ImageTask):
    """Training and evaluation of a detector.

    Attributes:
        evaluations: the evaluation of each model that was last evaluated.
    """

    best, lower, panels, sums = "AP", False, DETECTOR, ("loss", *PARTS)
    line = (
        "train loss {train_loss:.3f}",
        "held out loss {loss:.3f}, AP {AP:5.1f}, AP50 {AP50:5.1f}",
        "averaged weights {ema_AP:5.1f}, {ema_AP50:5.1f}",
    )
    result = "held-out AP {AP:.1f}, AP50 {AP50:.1f} ({count} images)"
    advice = "a lower lr, clip_max_norm: 0.1 or run.precision: fp32 may help"

    def __init__(
        self,
        config: DetConfig,
        accelerator: Accelerator,
        model: DETR,
        loaders: list[DataLoader],
        sources: list[CocoSource],
    ) -> None:
        spec = config.enc_rpe2d
        name = f"detr-{config.backbone}-{spec or 'plain'}-seed{config.seed}"
        about = {"model": "detr", "backbone": config.backbone, "enc_rpe2d": spec or "none"}
        about |= identity(sources[0].categories)
        bad = BadImages(config.data.on_bad_image)
        super().__init__(sources, loaders, bad, config, accelerator, model, name, about)
        costs = config.set_cost_class, config.set_cost_bbox, config.set_cost_giou
        weights = config.eos_coef, config.bbox_loss_coef, config.giou_loss_coef
        num_classes = model.class_embed.out_features - 1
        self.criterion = Criterion(num_classes, HungarianMatcher(*costs), *weights)
        self.criterion.to(accelerator.device)
        self.source = sources[-1]
        self.truth = self.source.ground_truth()
        self.evaluations: list[BoxEvaluation] = []
        self._ids: dict[str, list[int]] = {}  # image ids by file; entries may share a file
        for number in range(len(self.source)):
            self._ids.setdefault(self.source.name(number), []).append(self.source.image_id(number))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return make_optimizer(self.config, model)

    @property
    def clip_grad(self) -> float | None:
        return self.config.clip_max_norm or None

    def loss(self, model: nn.Module, batch: DetectionBatch, step: int) -> Step:
        """Compute DETR's loss of a batch, and its parts for the last decoder layer."""
        found = self.criterion(model(batch.images, batch.mask), batch.targets)
        count = len(batch.targets)
        parts = {name: found[name].detach() * count for name in PARTS}
        names = [target["image_id"] for target in batch.targets]
        return Step(found["loss"], count, parts, names)

    def evaluate(self, models: list[nn.Module]) -> list[dict[str, float]]:
        """Return the held-out ``loss``, its parts and COCO's twelve metrics of each model."""
        self.evaluations = [BoxEvaluation(self.truth, self.accelerator) for _ in models]
        with evaluating(self.criterion):
            metrics = super().evaluate(models)
        return [
            {**found, **evaluation.summarize()}
            for found, evaluation in zip(metrics, self.evaluations, strict=True)
        ]

    def missed(self, bad: Sequence[BadImage]) -> None:
        for evaluation in self.evaluations:
            evaluation.skip(number for item in bad for number in self._ids[item.name])

    def measure(self, model: nn.Module, batch: DetectionBatch, number: int) -> list[Tensor]:
        """Add a batch's detections to an evaluation; return the sums of its losses."""
        with self.accelerator.autocast():
            outputs: dict[str, Any] = model(batch.images, batch.mask)
        losses = self.criterion(outputs, batch.targets)
        sizes = torch.tensor([target["size"] for target in batch.targets])
        images = [target["image_id"] for target in batch.targets]
        self.evaluations[number].update(images, detections(outputs, sizes))
        return [losses[name].double() * len(images) for name in self.sums]

    def report(self) -> dict[str, float]:
        """Evaluate the model, and print COCO's table too."""
        (metrics,) = self.evaluate([self.model])
        if self.accelerator.is_main_process:
            print(self.evaluations[-1].summary(), self.verdict(metrics), sep="\n")
        return metrics

    def digest(self) -> Digest:
        if self.config.data.name == "digits":  # the scenes are reproducible
            return {}
        return self.sources[0].digest() | self.sources[1].digest()

    def finish(self, directory: RunDirectory | None, model: nn.Module) -> None:
        super().finish(directory, model)
        if not self.evaluations:  # the run was resumed after its last evaluation
            self.evaluate([model])
        curves, results = self.evaluations[-1].curves(), self.evaluations[-1].results()
        if directory is None:
            return
        directory.write_json("detections.json", results)
        draw_precision_recall(curves, directory / "precision_recall.png", directory.path.name)
        shown = self.examples(model, self.config.pictures) if self.config.pictures else []
        draw_detections(shown, directory / "detections.png", self.source.categories)

    @torch.no_grad()
    def examples(self, model: nn.Module, count: int) -> list[Example]:
        """Return ``count`` evenly spaced held-out images with the model's detections."""
        dataset, model = self.loaders[1].dataset, model.eval()
        found = []
        for index in range(0, len(dataset), max(1, len(dataset) // count))[:count]:
            batch = collate_detection([dataset[0, index]])
            if not batch.targets:
                continue
            batch = batch.to(self.accelerator.device)
            with self.accelerator.autocast():
                outputs = model(batch.images, batch.mask)
            image, annotations = self.source.read(index)
            boxes = box_convert(annotations.boxes, "xywh", "xyxy")
            found.append(
                Example(
                    Path(self.source.name(index)).name,
                    pil_to_tensor(image),
                    {"labels": annotations.category_ids, "boxes": boxes},
                    detections(outputs, torch.tensor([batch.targets[0]["size"]]))[0],
                )
            )
        return found


def _open(config: DetConfig, split: str) -> CocoSource:
    data = config.data
    if data.name == "digits":
        root = data.root or SCENES
        make_scenes(root, say=print)
        images, annotations = scene_paths(root, split)
    else:
        part = "train" if split == "train" else "val"
        images, annotations = (
            getattr(data, f"{part}_{name}") for name in ("images", "annotations")
        )
        if not (images and annotations):
            usual = _coco(config, part)
            images, annotations = images or usual[0], annotations or usual[1]
    names = ("on_bad_annotation", "on_bad_image", "exif")
    return open_coco(images, annotations, **{name: getattr(data, name) for name in names})


def _coco(config: DetConfig, part: str) -> tuple[str, str]:
    """Return the paths of images and annotations in ``coco_path``, extracted or in archives."""
    if config.coco_path is None:
        raise UserError(
            "coco_path is not set, and data.name: coco needs it (or all four of "
            "data.train_images, data.train_annotations, data.val_images, data.val_annotations)"
        )
    root, file = Path(config.coco_path), f"annotations/instances_{part}2017.json"
    images, packed = root / f"{part}2017", root / f"{part}2017.zip"
    if not images.exists() and packed.exists():
        images = packed
    archive = root / "annotations_trainval2017.zip"
    inside = not (root / file).exists() and archive.exists()
    return str(images), str((archive if inside else root) / file)
