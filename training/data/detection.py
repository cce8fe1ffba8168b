"""Detection batches: images of different sizes, padded, with their boxes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from training.data.coco import Annotations
from training.data.seeded import BadImage, Sample, SeededDataset


class DetectionDataset(SeededDataset):
    """A :class:`~training.data.coco.CocoSource` with a ``DetectionTransform``; else as its base."""

    def apply(self, image: Image.Image, target: Annotations) -> tuple[Tensor, dict[str, Any]]:
        return self.transform(image, target)


@dataclass
class DetectionBatch:
    """Images of a batch and what is in them.

    Attributes:
        images: [B, 3, H, W], padded with zeros right and below. mask: bool [B, H, W], True for
            padding.
        targets: for each image labels [T], boxes [T, 4], image_id and size; see
            ``DetectionTransform``.
        bad: the images that were skipped for them.
    """

    images: Tensor
    mask: Tensor
    targets: list[dict[str, Any]]
    bad: tuple[BadImage, ...] = ()

    def to(self, device: torch.device | str) -> DetectionBatch:
        """The same batch on a device; it does not wait for copies from pinned memory."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> DetectionBatch:
        """What a loader calls to pin a batch."""
        return self._each(Tensor.pin_memory)

    def _each(self, move: Any) -> DetectionBatch:
        targets = [
            {key: move(value) if isinstance(value, Tensor) else value for key, value in t.items()}
            for t in self.targets
        ]
        return replace(self, images=move(self.images), mask=move(self.mask), targets=targets)


def collate_detection(samples: list[Sample]) -> DetectionBatch:
    """Pad the samples that have an image to their largest; B may be 0 where none of them has."""
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
