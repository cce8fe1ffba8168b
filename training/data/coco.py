"""COCO's detection data: an instances file, and images in a folder or a zip archive."""

from __future__ import annotations

import hashlib
import io
import itertools
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from training.data.digest import Digest, stat_digest
from training.data.files import Archive, Folder, open_files, read_file
from training.data.instances import Instances, read_instances
from training.data.pixels import decode, swaps_sides, to_rgb
from training.errors import UserError

Policy = Literal["skip", "fail"]


@dataclass(frozen=True)
class Annotations:
    """The annotations of an image, with crowds.

    Attributes:
        boxes: float32 [T, 4], x, y, width, height in pixels, clipped to the image.
        category_ids: int64 [T].
        iscrowd: bool [T].
        area: float32 [T], in pixels.
    """

    boxes: Tensor
    category_ids: Tensor
    iscrowd: Tensor
    area: Tensor
    image_id: int


class CocoSource:
    """Images and their annotations by index, in ascending order of image ids.

    Attributes:
        left_out: a line for each image and annotation that was left out.
    """

    def __init__(
        self, files: Folder | Archive, instances: Instances, annotations: str, exif: bool = False
    ) -> None:
        self.files, self.file, self.exif = files, annotations, exif
        self.left_out, self.categories = instances.problems, instances.categories
        self._instances = instances
        count = len(instances.image_ids)
        self._starts = np.searchsorted(instances.image, np.arange(count + 1))

    @property
    def image_ids(self) -> list[int]:
        return self._instances.image_ids.tolist()

    def __len__(self) -> int:
        return len(self._instances.image_ids)

    def image_id(self, index: int) -> int:
        return int(self._instances.image_ids[index])

    def name(self, index: int) -> str:
        return self.files.path(str(self._instances.names[index]))

    def read(self, index: int) -> tuple[Image.Image, Annotations]:
        """Return an RGB image and its annotations.

        Raises:
            Exception: one of ``DECODE_ERRORS`` if the image cannot be read, or its size differs
                from the annotated size.
        """
        content = self.files.read(str(self._instances.names[index]))
        image = to_rgb(decode(io.BytesIO(content), exif=self.exif))
        height, width = self._instances.sizes[index].tolist()
        if image.size != (width, height):
            hint = ""
            if image.size == (height, width) and swaps_sides(content):
                other = str(not self.exif).lower()
                hint = f": its EXIF orientation swaps them, and data.exif: {other} would fit"
            raise ValueError(
                f"it has {image.width} x {image.height} pixels, but is annotated as "
                f"{width} x {height}{hint}"
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

    def digest(self) -> Digest:
        """Return the digest of the instances file and of the image files."""
        content = hashlib.sha256(read_file(self.file, "annotations")).hexdigest()[:16]
        if isinstance(self.files, Archive):
            parts = {self.files.archive: [self.files.archive]}
        else:
            name = f"{self.files.root} of {self.file}"  # splits may share a folder
            parts = {name: [self.name(index) for index in range(len(self))]}
        return {self.file: (1, content), **stat_digest(parts)}

    def ground_truth(self) -> dict[str, Any]:
        """Return the content of the instances file, without entries that were left out.

        Boxes are not clipped. Ids of annotations start from 1: pycocotools treats a match with id 0
        as none.
        """
        held = self._instances
        images = zip(self.image_ids, held.names.tolist(), *held.sizes.T.tolist(), strict=True)
        columns = (
            held.image_ids[held.image],
            held.category_ids,
            held.boxes,
            held.area,
            held.iscrowd.astype(int),
        )
        rows = zip(itertools.count(1), *(column.tolist() for column in columns), strict=False)
        entries = {
            "images": ("id file_name height width", images),
            "annotations": ("id image_id category_id bbox area iscrowd", rows),
            "categories": ("id name", self.categories.items()),
        }
        return {
            kind: [dict(zip(names.split(), row, strict=True)) for row in found]
            for kind, (names, found) in entries.items()
        }


def open_coco(
    images: str,
    annotations: str,
    *,
    on_bad_annotation: Policy = "skip",
    on_bad_image: Policy = "skip",
    exif: bool = False,
) -> CocoSource:
    """Open images and their instances file; each may be inside a zip archive.

    Args:
        images: a folder, ``train2017.zip``, or a folder in one, ``coco.zip/train2017``.
        annotations: a file, or a file in an archive.
        on_bad_annotation: "skip" lists invalid entries of the file in ``left_out``; "fail" raises.
        on_bad_image: the same for images in the file that do not exist.
        exif: apply the EXIF orientation of images; annotations must be of the rotated images.

    Raises:
        UserError: if a path cannot be read, the file is not an instances file, a policy is "fail"
            and an entry is invalid, or no image is left.
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
        f"it has {counts[index]} annotations"
        for index in np.flatnonzero(~there)
    ]
    _apply(on_bad_image, absent, annotations, "data.on_bad_image")
    kept = replace(instances.only(there), problems=instances.problems + absent)
    return CocoSource(files, kept, annotations, exif)


def _apply(policy: Policy, problems: list[str], path: str, option: str) -> None:
    if policy == "fail" and problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{path!r}: {problems[0]}{more}; {option}: skip would leave it out")


def _clipped(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Clip boxes [A, 4] (x, y, width, height) to images of ``sizes`` [A, 2] (height, width)."""
    limits = sizes[:, ::-1]
    first = np.clip(boxes[:, :2], 0, limits)
    last = np.clip(boxes[:, :2] + boxes[:, 2:], 0, limits)
    inside = (boxes[:, :2] >= 0).all(1) & (boxes[:, :2] + boxes[:, 2:] <= limits).all(1)
    # Keep inner boxes exact: x + width - x may round.
    return np.where(inside[:, None], boxes, np.concatenate((first, last - first), axis=1))
