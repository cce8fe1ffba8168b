"""A detection run from its configuration to its folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from training import run
from training.badimages import BadImages
from training.curves import DETECTOR
from training.data.coco import CocoSource, open_coco
from training.data.det_transforms import evaluation_transform, training_transform
from training.data.detection import DetectionDataset, collate_detection
from training.data.loaders import make_loader
from training.data.scenes import make_scenes, scene_paths
from training.det.detect import Detect
from training.det.model import build_model, make_criterion, make_optimizer
from training.det.options import DetConfig
from training.det.pictures import draw_detections, draw_precision_recall
from training.engine import make_accelerator, per_process_batch
from training.errors import UserError
from training.runfolder import RunFolder

SCENES = "data/digits-detection"


def evaluate(config: DetConfig) -> dict[str, float]:
    """Evaluate ``config.checkpoint``, print and return its figures."""
    if config.checkpoint is None:
        raise UserError("eval_only needs checkpoint: FILE")
    run.check_numbers(config)
    accelerator = make_accelerator(config.run)
    held_out = _open(config, accelerator, "validation")
    model = build_model(config, held_out.num_classes).to(accelerator.device)
    task = Detect(
        accelerator,
        (None, _loader(config, accelerator, held_out, training=False)),
        make_criterion(config, model),
        held_out,
        BadImages(config.data.on_bad_image, print),
    )
    (figures,) = task.evaluate([model])
    if accelerator.is_main_process:
        print(table(figures))
        print(_verdict(figures))
    return figures


def train(config: DetConfig) -> dict[str, Any]:
    """Train, leave a run folder, and return the last epoch's record."""
    run.check_numbers(config)
    if config.lr_drop < 1:
        raise UserError(f"lr_drop: {config.lr_drop} is not at least 1")
    config = dataclasses.replace(
        config, sched=dataclasses.replace(config.sched, decay_epochs=config.lr_drop)
    )
    accelerator = make_accelerator(config.run)
    sources = tuple(_open(config, accelerator, split) for split in ("train", "validation"))
    if sources[0].categories != sources[1].categories:
        raise UserError("the training and the held-out annotations have different categories")
    loaders = (
        _loader(config, accelerator, sources[0], training=True),
        _loader(config, accelerator, sources[1], training=False),
    )
    model = build_model(config, sources[0].num_classes).to(accelerator.device)
    criterion = make_criterion(config, model)

    def finish(task: Detect, folder: RunFolder | None, model: nn.Module) -> None:
        if task.last is None:  # a run that was stopped after its last evaluation
            task.evaluate([model])
        left_out = [line for source in sources for line in source.report.skipped]
        curves, results = task.last.curves(), task.last.results()
        if folder is None:
            return
        folder.write_json("left_out.json", left_out)
        folder.write_json("detections.json", results)
        draw_precision_recall(curves, folder / "precision_recall.png", folder.path.name)
        shown = task.examples(model, config.pictures) if config.pictures else []
        draw_detections(shown, folder / "detections.png", sources[1].categories)

    spec = config.enc_rpe2d
    return run.train(
        config,
        accelerator,
        model,
        lambda model: make_optimizer(config, model),
        lambda say: Detect(
            accelerator,
            loaders,
            criterion,
            sources[1],
            BadImages(config.data.on_bad_image, say),
        ),
        name=f"detr-{config.backbone}-{spec or 'plain'}-seed{config.seed}",
        spec=spec,
        steps=run.steps_per_epoch(
            len(loaders[0]), config.grad_accum_steps, config.batch_size, len(sources[0])
        ),
        best="AP",
        clip_grad=config.clip_max_norm or None,
        about={"model": "detr", "backbone": config.backbone, "enc_rpe2d": spec or "none"},
        advice="a lower lr, clip_max_norm: 0.1 or run.precision: fp32 may help",
        line=_line,
        panels=DETECTOR,
        verdict=_verdict,
        finish=finish,
    )


def table(figures: dict[str, float]) -> str:
    """COCO's twelve numbers as pycocotools words them, a line each."""
    lines = []
    for name, (what, iou, area, most) in ROWS.items():
        lines.append(
            f"{name:6}{what} at IoU {iou:9} of {area:6} objects, {most:>3} detections: "
            f"{figures[name]:.3f}"
        )
    return "\n".join(lines)


_PRECISION, _RECALL = "average precision", "average recall   "
ROWS = {
    "AP": (_PRECISION, "0.50:0.95", "all", 100),
    "AP50": (_PRECISION, "0.50", "all", 100),
    "AP75": (_PRECISION, "0.75", "all", 100),
    "APs": (_PRECISION, "0.50:0.95", "small", 100),
    "APm": (_PRECISION, "0.50:0.95", "medium", 100),
    "APl": (_PRECISION, "0.50:0.95", "large", 100),
    "AR1": (_RECALL, "0.50:0.95", "all", 1),
    "AR10": (_RECALL, "0.50:0.95", "all", 10),
    "AR100": (_RECALL, "0.50:0.95", "all", 100),
    "ARs": (_RECALL, "0.50:0.95", "small", 100),
    "ARm": (_RECALL, "0.50:0.95", "medium", 100),
    "ARl": (_RECALL, "0.50:0.95", "large", 100),
}


def _open(config: DetConfig, accelerator: Accelerator, split: str) -> CocoSource:
    data = config.data
    if data.name == "digits":
        root = data.root or SCENES
        make_scenes(root, say=print)
        images, annotations = scene_paths(root, split)
    else:
        part = "train" if split == "train" else "val"
        images = getattr(data, f"{part}_images") or _coco_images(config, f"{part}2017")
        annotations = getattr(data, f"{part}_annotations") or _coco_annotations(config, part)
    source = open_coco(
        images,
        annotations,
        on_bad_annotation=data.on_bad_annotation,
        on_bad_image=data.on_bad_image,
    )
    if accelerator.is_main_process and source.report.skipped:
        first = source.report.skipped[0]
        print(f"{len(source.report.skipped)} entries of {annotations} are left out, as {first}")
    return source


def _coco_images(config: DetConfig, name: str) -> str:
    folder = _coco_path(config) / name
    archive = folder.with_name(f"{name}.zip")
    if not folder.exists() and archive.exists():
        return str(archive)
    return str(folder)


def _coco_annotations(config: DetConfig, part: str) -> str:
    file = _coco_path(config) / "annotations" / f"instances_{part}2017.json"
    archive = _coco_path(config) / "annotations_trainval2017.zip"
    if not file.exists() and archive.exists():
        return str(archive / "annotations" / file.name)
    return str(file)


def _coco_path(config: DetConfig) -> Path:
    if config.coco_path is None:
        raise UserError(
            "coco_path is not set, and data.name: coco needs it (or all four of "
            "data.train_images, data.train_annotations, data.val_images, data.val_annotations)"
        )
    return Path(config.coco_path)


def _loader(
    config: DetConfig, accelerator: Accelerator, source: CocoSource, *, training: bool
) -> DataLoader:
    aug = config.aug
    batch = per_process_batch(accelerator, config.batch_size, config.grad_accum_steps)
    if not training:
        batch = config.eval_batch_size or batch
    colours = {"mean": aug.mean, "std": aug.std}
    if training and aug.enabled:
        transform = training_transform(
            scales=aug.scales,
            max_size=aug.max_size,
            hflip=aug.hflip,
            crop=aug.crop_prob,
            crop_scales=aug.crop_scales,
            crop_size=aug.crop_size,
            **colours,
        )
    else:
        transform = evaluation_transform(size=aug.eval_size, max_size=aug.max_size, **colours)
    return make_loader(
        DetectionDataset(source, transform, config.seed, replace=training),
        batch_size=batch,
        training=training,
        seed=config.seed,
        workers=config.data.workers,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
        collate=collate_detection,
    )


def _verdict(figures: dict[str, Any]) -> str:
    prefix = "ema_" if "ema_AP" in figures else ""
    ap, ap50 = figures[f"{prefix}AP"], figures[f"{prefix}AP50"]
    return f"held-out AP {100 * ap:.1f}, AP50 {100 * ap50:.1f} ({figures['count']} images)"


def _line(record: dict[str, Any], epochs: int) -> str:
    parts = [
        f"epoch {record['epoch']:{len(str(epochs))}}/{epochs}",
        f"train loss {record['train_loss']:.3f}",
    ]
    if "AP" in record:
        parts.append(
            f"held out loss {record['loss']:.3f}, AP {100 * record['AP']:5.1f}, "
            f"AP50 {100 * record['AP50']:5.1f}"
        )
    if "ema_AP" in record:
        parts.append(
            f"averaged weights {100 * record['ema_AP']:5.1f}, {100 * record['ema_AP50']:5.1f}"
        )
    return "  |  ".join(parts)
