"""DETR's transforms of an image with its boxes (Carion et al., ECCV 2020, appendix A.4).

The original's order and rules, on torchvision's v2 transforms: sizes are rounded as there, boxes
that a crop leaves without area are dropped with their labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes

from training.data.coco import Annotations
from training.errors import UserError

# ImageNet's, which the backbones were trained with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALES = tuple(range(480, 801, 32))


def resized_size(height: int, width: int, size: int, max_size: int | None) -> tuple[int, int]:
    """Height and width of an image whose shorter side becomes ``size`` pixels.

    Fewer where the longer side would exceed ``max_size`` (rounding may then leave it a pixel more).
    """
    short, long = min(height, width), max(height, width)
    if max_size is not None and long / short * size > max_size:
        # At least 1, or a thread-like image would vanish.
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
    """Crop to a height and a width that are drawn each from ``smallest`` to ``largest`` pixels."""

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
    """A PIL image and its annotations to what a model takes.

    Returns the normalised image, float32 [3, H, W], and its target: labels int64 [T] (category
    ids), boxes float32 [T, 4] (center x, center y, width, height in units of this image, before
    any padding), image_id, and size, the (height, width) of the image as it was. Crowds are left
    out.
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
        corners = annotations.boxes[one].clone()
        corners[:, 2:] += corners[:, :2]
        boxes = BoundingBoxes(corners, format="XYXY", canvas_size=original)
        image, boxes = self.geometry(image, F.clamp_bounding_boxes(boxes))
        corners = boxes.as_subclass(Tensor)
        kept = (corners[:, 2:] > corners[:, :2]).all(1)
        corners = corners[kept]
        size = torch.tensor((image.width, image.height), dtype=torch.float32)
        centers = (corners[:, :2] + corners[:, 2:]) / 2 / size
        extents = (corners[:, 2:] - corners[:, :2]) / size
        target = {
            "labels": labels[kept],
            "boxes": torch.cat((centers, extents), dim=1),
            "image_id": annotations.image_id,
            "size": original,
        }
        return self.pixels(image).as_subclass(Tensor), target


def training_transform(
    *,
    scales: Sequence[int] = SCALES,
    max_size: int | None = 1333,
    hflip: float = 0.5,
    crop: float = 0.5,
    crop_scales: Sequence[int] = (400, 500, 600),
    crop_size: tuple[int, int] = (384, 600),
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> DetectionTransform:
    """Flip, then resize, with or without resizing and cropping before that.

    Args:
        scales, max_size: lengths of the shorter side, and the most that the longer may have.
        hflip, crop: probabilities. crop_scales: shorter sides before the crop.
        crop_size: least and greatest side of the crop.

    Raises:
        UserError: for sizes and probabilities that make no sense.
    """
    _check_sizes(scales=scales, max_size=max_size, crop_scales=crop_scales, crop_size=crop_size)
    if len(crop_size) != 2 or crop_size[0] > crop_size[1]:
        raise UserError(f"aug.crop_size: {list(crop_size)} is not a least and a greatest size")
    for name, value in (("hflip", hflip), ("crop_prob", crop)):
        if not 0 <= value <= 1:
            raise UserError(f"aug.{name}: {value} is not a probability")
    cropped = [ShorterSide(crop_scales), RandomSizeCrop(*crop_size)]
    steps = [
        v2.RandomHorizontalFlip(hflip),
        v2.RandomApply(cropped, crop),
        ShorterSide(scales, max_size),
    ]
    return DetectionTransform(steps, mean, std)


def evaluation_transform(
    *,
    size: int = 800,
    max_size: int | None = 1333,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> DetectionTransform:
    """Resize only."""
    _check_sizes(eval_size=size, max_size=max_size)
    return DetectionTransform([ShorterSide([size], max_size)], mean, std)


def _check_sizes(**options: Sequence[int] | int | None) -> None:
    for name, value in options.items():
        sizes = [value] if isinstance(value, int) else value
        if sizes is not None and (not len(sizes) or min(sizes) < 1):
            raise UserError(f"aug.{name}: {value} is no number of pixels, or holds what is none")
