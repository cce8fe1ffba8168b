"""Detection batches, and DETR's transforms of an image with its boxes.

The transforms have the order and rounding of the authors' code (Carion et al., ECCV 2020, appendix
A.4), and use torchvision's v2 transforms. Boxes without area after a crop are dropped with their
labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_convert
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes

from training.data.coco import Annotations
from training.data.loaders import Movable
from training.data.seeded import BadImage, Sample, SeededDataset
from training.det.options import DetAugConfig
from training.errors import UserError


def resized_size(height: int, width: int, size: int, max_size: int | None) -> tuple[int, int]:
    """Return height and width of an image resized to a shorter side of ``size`` pixels.

    The shorter side is smaller if the longer side would exceed ``max_size``; due to rounding, the
    longer side may still exceed it by a pixel.
    """
    short, long = min(height, width), max(height, width)
    if max_size is not None and long / short * size > max_size:
        # At least 1, for very thin images.
        size = max(1, round(max_size * short / long))
    longer = int(size * long / short)
    return (longer, size) if height >= width else (size, longer)


class ShorterSide(v2.Transform):
    """Resize to a shorter side drawn from ``sizes``."""

    def __init__(self, sizes: Sequence[int], max_size: int | None = None) -> None:
        super().__init__()
        self.sizes, self.max_size = tuple(sizes), max_size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        size = self.sizes[int(torch.randint(len(self.sizes), ()))]
        height, width = v2.query_size(flat_inputs)
        return {"size": resized_size(height, width, size, self.max_size)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.resize(inpt, list(params["size"]))


class RandomSizeCrop(v2.Transform):
    """Crop to a random height and width, each from ``smallest`` to ``largest`` pixels."""

    def __init__(self, smallest: int, largest: int) -> None:
        super().__init__()
        self.smallest, self.largest = smallest, largest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        params = {}
        names = ("top", "height"), ("left", "width")
        for side, (start, length) in zip(v2.query_size(flat_inputs), names, strict=True):
            least, most = min(self.smallest, side), min(self.largest, side)
            params[length] = int(torch.randint(least, most + 1, ()))
            params[start] = int(torch.randint(side - params[length] + 1, ()))
        return params

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.crop(inpt, **params)


class DetectionTransform:
    """Converts a PIL image and its annotations to model inputs.

    The image is normalised, float32 [3, H, W]. The target has labels int64 [T] (category ids),
    boxes float32 [T, 4] (center x, center y, width, height as fractions of this image before
    padding), image_id, and size, the original (height, width). Crowds are left out.
    """

    def __init__(
        self, steps: list[v2.Transform], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.geometry = v2.Compose([v2.Identity(), *steps])
        self.pixels = v2.Compose(
            [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
        )

    def __call__(
        self, image: Image.Image, annotations: Annotations
    ) -> tuple[Tensor, dict[str, Any]]:
        original = image.height, image.width
        one = ~annotations.iscrowd
        labels = annotations.category_ids[one]
        corners = box_convert(annotations.boxes[one], "xywh", "xyxy")
        boxes = BoundingBoxes(corners, format="XYXY", canvas_size=original)
        image, boxes = self.geometry(image, F.clamp_bounding_boxes(boxes))
        corners = boxes.as_subclass(Tensor)
        kept = (corners[:, 2:] > corners[:, :2]).all(1)
        size = torch.tensor((image.width, image.height) * 2, dtype=torch.float32)
        target = {
            "labels": labels[kept],
            "boxes": box_convert(corners[kept], "xyxy", "cxcywh") / size,
            "image_id": annotations.image_id,
            "size": original,
        }
        return self.pixels(image).as_subclass(Tensor), target


def make_transform(aug: DetAugConfig, *, training: bool) -> DetectionTransform:
    """Return the transform of training or held-out images.

    Held-out images are only resized. Training images are flipped at random, at random resized and
    cropped, then resized.

    Raises:
        UserError: if sizes are invalid.
    """
    for name in ("scales", "max_size", "crop_scales", "crop_size", "eval_size"):
        value = getattr(aug, name)
        sizes = [value] if isinstance(value, int) else value
        if not len(sizes) or min(sizes) < 1:
            raise UserError(f"aug.{name}: {value} must be at least 1 pixel")
    if aug.crop_size[0] > aug.crop_size[1]:
        raise UserError(f"aug.crop_size: {aug.crop_size} must be a smallest and a largest size")
    steps: list[v2.Transform] = [ShorterSide([aug.eval_size], aug.max_size)]
    if training and aug.enabled:
        cropped = [ShorterSide(aug.crop_scales), RandomSizeCrop(*aug.crop_size)]
        steps = [
            v2.RandomHorizontalFlip(aug.hflip),
            v2.RandomApply(cropped, aug.crop_prob),
            ShorterSide(aug.scales, aug.max_size),
        ]
    return DetectionTransform(steps, aug.mean, aug.std)


class DetectionDataset(SeededDataset):
    """A :class:`~training.data.coco.CocoSource` with a ``DetectionTransform``."""

    def apply(self, image: Image.Image, target: Annotations) -> tuple[Tensor, dict[str, Any]]:
        return self.transform(image, target)


@dataclass
class DetectionBatch(Movable):
    """Images of a batch and their targets.

    Attributes:
        images: float32 [B, 3, H, W], padded with zeros at the right and bottom.
        mask: bool [B, H, W], True for padding.
        targets: for each image labels [T], boxes [T, 4], image_id and size; see
            ``DetectionTransform``.
        bad: the images that were skipped.
    """

    images: Tensor
    mask: Tensor
    targets: list[dict[str, Any]]
    bad: tuple[BadImage, ...] = ()


def collate_detection(samples: list[Sample]) -> DetectionBatch:
    """Pad the images of samples to the largest one; B is 0 if no sample has an image."""
    bad = tuple(item for sample in samples for item in sample.bad)
    good = [(sample.image, sample.target) for sample in samples if sample.image is not None]
    height, width = (max((image.shape[axis] for image, _ in good), default=0) for axis in (1, 2))
    images = torch.zeros(len(good), 3, height, width)
    mask = torch.ones(len(good), height, width, dtype=torch.bool)
    for (image, _), row, padding in zip(good, images, mask, strict=True):
        _, rows, columns = image.shape
        row[:, :rows, :columns] = image
        padding[:rows, :columns] = False
    return DetectionBatch(images, mask, [target for _, target in good], bad)
