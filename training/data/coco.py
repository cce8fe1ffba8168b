"""COCO's detection data: an instances file and images in a folder or an unextracted zip archive."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor

from training.data.files import Archive, Folder, open_files
from training.data.instances import Instances, read_instances
from training.data.pixels import decode_rgb
from training.errors import UserError

Policy = Literal["skip", "fail"]


@dataclass(frozen=True)
class Annotations:
    """What is in an image; crowds too.

    Attributes:
        boxes: float32 [T, 4], x, y, width, height in pixels, clipped to the image.
        category_ids: int64 [T]. iscrowd: bool [T]. area: float32 [T].
    """

    boxes: Tensor
    category_ids: Tensor
    iscrowd: Tensor
    area: Tensor
    image_id: int


@dataclass
class CocoReport:
    """What was found while opening a data set.

    Attributes:
        skipped: images and annotations that were left out, one line each.
        clipped: boxes that are partly outside of their image, and are clipped in training.
        without_boxes: images that have no box to learn, because they have none or only crowds.
    """

    skipped: list[str] = field(default_factory=list)
    clipped: int = 0
    without_boxes: int = 0


class CocoSource:
    """Images and their annotations by number, in ascending order of image ids."""

    def __init__(self, files: Folder | Archive, instances: Instances, report: CocoReport) -> None:
        self.files, self.report = files, report
        self.categories = instances.categories
        self._instances = instances
        count = len(instances.image_ids)
        self._starts = np.searchsorted(instances.image, np.arange(count + 1))

    @property
    def image_ids(self) -> list[int]:
        return self._instances.image_ids.tolist()

    @property
    def num_classes(self) -> int:
        """Category ids are class numbers, so that COCO's 80 categories make 91 classes."""
        return max(self.categories) + 1

    def __len__(self) -> int:
        return len(self._instances.image_ids)

    def image_id(self, index: int) -> int:
        return int(self._instances.image_ids[index])

    def name(self, index: int) -> str:
        return self.files.path(str(self._instances.names[index]))

    def read(self, index: int) -> tuple[Image.Image, Annotations]:
        """Return an RGB image and its annotations.

        Raises OSError and its kin (``DECODE_ERRORS``) if the image cannot be read, or has another
        size than the annotations say: nobody knows what their boxes mean then.
        """
        image = decode_rgb(self.files.read(str(self._instances.names[index])))
        height, width = self._instances.sizes[index].tolist()
        if image.size != (width, height):
            raise ValueError(
                f"it has {image.width} x {image.height} pixels, but is annotated as "
                f"{width} x {height}"
            )
        return image, self.annotations(index)

    def annotations(self, index: int) -> Annotations:
        held = self._instances
        mine = slice(*self._starts[index : index + 2])
        boxes = _clipped(held.boxes[mine], held.sizes[index][None])
        return Annotations(
            torch.tensor(boxes, dtype=torch.float32),
            torch.tensor(held.category_ids[mine]),
            torch.tensor(held.iscrowd[mine]),
            torch.tensor(held.area[mine], dtype=torch.float32),
            self.image_id(index),
        )

    def coco_ground_truth(self) -> COCO:
        """Return what detections are compared with: boxes as in the file, unclipped, and crowds.

        Annotations are numbered anew from 1: pycocotools takes a match with number 0 for none.
        """
        held = self._instances
        images = zip(self.image_ids, held.names.tolist(), held.sizes.tolist(), strict=True)
        rows = zip(
            held.image_ids[held.image].tolist(),
            held.category_ids.tolist(),
            held.boxes.tolist(),
            held.area.tolist(),
            held.iscrowd.tolist(),
            strict=True,
        )
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": [
                {"id": number, "file_name": name, "height": size[0], "width": size[1]}
                for number, name, size in images
            ],
            "annotations": [
                {
                    "id": count,
                    "image_id": image,
                    "category_id": category,
                    "bbox": box,
                    "area": area,
                    "iscrowd": int(crowd),
                }
                for count, (image, category, box, area, crowd) in enumerate(rows, start=1)
            ],
            "categories": [{"id": key, "name": name} for key, name in self.categories.items()],
        }
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
        return truth


def open_coco(
    images: str,
    annotations: str,
    *,
    on_bad_annotation: Policy = "skip",
    on_bad_image: Policy = "skip",
    keep_without_boxes: bool = True,
) -> CocoSource:
    """Open images and their instances file; each may be inside a zip archive.

    Args:
        images: a folder, ``train2017.zip``, or a folder in one, ``coco.zip/train2017``.
        annotations: a file, or a file in an archive.
        on_bad_annotation: entries of the file that cannot be used are left out, and named in
            ``report.skipped``, or end in an error.
        on_bad_image: the same for images that the file lists and that are not there.
        keep_without_boxes: False leaves out images without a box to learn.

    Raises:
        UserError: if a path cannot be read, the file is not an instances file, a policy is "fail"
            and something is wrong, or nothing is left.
    """
    files = open_files(images, "images")
    instances = read_instances(annotations)
    _apply(on_bad_annotation, instances.problems, annotations, "data.on_bad_annotation")
    if not len(instances.image_ids):
        raise UserError(
            f"annotations: no image in {annotations!r} can be used: {instances.problems[0]}"
        )
    there = np.array([name in files for name in instances.names.tolist()], dtype=bool)
    if not there.any():
        first = str(instances.names[0])
        raise UserError(
            f"images: {images!r} has none of the {len(there)} images that {annotations!r} lists; "
            f"the first would be {files.path(first)!r}"
        )
    counts = np.bincount(instances.image, minlength=len(there))
    absent = [
        f"image {instances.image_ids[index]}: no file {files.path(str(instances.names[index]))!r}; "
        f"{counts[index]} annotations go with it"
        for index in np.flatnonzero(~there)
    ]
    _apply(on_bad_image, absent, annotations, "data.on_bad_image")
    instances = instances.only(there)
    to_learn = np.bincount(instances.image[~instances.iscrowd], minlength=there.sum()) > 0
    clipped = _clipped(instances.boxes, instances.sizes[instances.image]) != instances.boxes
    report = CocoReport(
        skipped=instances.problems + absent,
        clipped=int(clipped.any(axis=1).sum()),
        without_boxes=int((~to_learn).sum()),
    )
    if not keep_without_boxes:
        if not to_learn.any():
            raise UserError(f"annotations: no image in {annotations!r} has a box to learn")
        instances = instances.only(to_learn)
    return CocoSource(files, instances, report)


def _apply(policy: Policy, problems: list[str], path: str, option: str) -> None:
    if policy == "fail" and problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{path!r}: {problems[0]}{more}; {option}: skip would leave it out")


def _clipped(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Boxes [A, 4] (x, y, width, height) clipped to images of ``sizes`` [A, 2] (height, width)."""
    limits = sizes[:, ::-1]
    first = np.clip(boxes[:, :2], 0, limits)
    last = np.clip(boxes[:, :2] + boxes[:, 2:], 0, limits)
    inside = (boxes[:, :2] >= 0).all(1) & (boxes[:, :2] + boxes[:, 2:] <= limits).all(1)
    # x + width - x is not always width.
    return np.where(inside[:, None], boxes, np.concatenate((first, last - first), axis=1))
