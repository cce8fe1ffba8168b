"""COCO's instances files, checked entry by entry."""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from training.data.files import read_file
from training.errors import UserError

_OF_IMAGES = ("image_ids", "names", "sizes")
_OF_ANNOTATIONS = ("image", "category_ids", "iscrowd", "area", "boxes")
_LARGEST = 9999  # category id


@dataclass
class Instances:
    """An instances file of I images and A annotations as arrays, which loader processes share.

    Attributes:
        image_ids: int64 [I], ascending.
        names: [I], names of files.
        sizes: int64 [I, 2], height and width.
        image: int64 [A], index of an annotation's image in ``image_ids``, ascending.
        category_ids: int64 [A].
        iscrowd: bool [A].
        area: [A], in pixels.
        boxes: [A, 4], x, y, width, height as in the file.
        categories: names by id.
        problems: a line for each entry that was left out.
    """

    image_ids: np.ndarray
    names: np.ndarray
    sizes: np.ndarray
    image: np.ndarray
    category_ids: np.ndarray
    iscrowd: np.ndarray
    area: np.ndarray
    boxes: np.ndarray
    categories: dict[int, str]
    problems: list[str] = field(default_factory=list)

    def only(self, keep: np.ndarray) -> Instances:
        """Return the images whose ``keep``, bool [I], is true, and their annotations."""
        mine = keep[self.image]
        parts = {name: getattr(self, name)[mine] for name in _OF_ANNOTATIONS}
        parts["image"] = (np.cumsum(keep) - 1)[parts["image"]]
        images = {name: getattr(self, name)[keep] for name in _OF_IMAGES}
        return replace(self, **images, **parts)


def read_instances(path: str) -> Instances:
    """Read an instances file, without invalid entries.

    Raises:
        UserError: if the file cannot be read, or is not an instances file in JSON.
    """
    data = _load(path)
    categories = _categories(path, data["categories"])
    problems: list[str] = []
    images = _images(data["images"], problems)
    place = {number: index for index, number in enumerate(sorted(images))}
    # An array to save memory: COCO has 860,000 annotations.
    rows = array("d")
    for number, entry in enumerate(data["annotations"]):
        reason = _check_annotation(entry, images, categories)
        if reason is None:
            _, _, width, height = box = entry["bbox"]
            area = _optional(entry.get("area"), width * height)
            crowd = _optional(entry.get("iscrowd"), 0)
            rows.extend((place[entry["image_id"]], entry["category_id"], crowd, area, *box))
        else:
            label = entry.get("id") if isinstance(entry, dict) else None
            problems.append(f"annotation {label!r} (number {number} of the list): {reason}")
    # Sort by image; the annotations of an image stay in the order of the file.
    table = np.array(rows).reshape(-1, 8)
    table = table[np.argsort(table[:, 0], kind="stable")]
    return Instances(
        image_ids=np.array(list(place), dtype=np.int64),
        names=np.array([images[number][0] for number in place], dtype=object).astype(str),
        sizes=np.array([images[number][1:] for number in place], dtype=np.int64).reshape(-1, 2),
        image=table[:, 0].astype(np.int64),
        category_ids=table[:, 1].astype(np.int64),
        iscrowd=table[:, 2].astype(bool),
        area=table[:, 3],
        boxes=table[:, 4:],
        categories=categories,
        problems=problems,
    )


def _load(path: str) -> dict[str, Any]:
    content = read_file(path, "annotations")
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"annotations: {path!r} is not JSON: {error}") from error
    wanted = "an instances file has the lists images, annotations and categories"
    if not isinstance(data, dict):
        raise UserError(f"annotations: {path!r} contains a {type(data).__name__}; {wanted}")
    for name in ("images", "annotations", "categories"):
        if not isinstance(data.get(name), list):
            held = ", ".join(sorted(map(str, data))[:8]) or "nothing"
            raise UserError(f"annotations: {path!r} has no list {name!r} but {held}; {wanted}")
        if not data[name] and name != "annotations":
            raise UserError(f"annotations: {path!r} has no {name}")
    entries = data["annotations"]
    if entries and not any(isinstance(entry, dict) and "bbox" in entry for entry in entries):
        raise UserError(f"annotations: {path!r} is not an instances file: no annotation has a bbox")
    return data


def _optional(value: object, default: float) -> float | None:
    """Return area or iscrowd as a number; null is the default, strings are parsed; else None."""
    if value is None:
        return default
    if isinstance(value, str | bool):
        try:
            value = float(value)
        except ValueError:
            return None
    return value if _number(value) else None


def _number(value: object) -> bool:
    """Return whether a value is a finite number that fits in a double."""
    return type(value) in (int, float) and -(2**53) < value < 2**53


def _whole(value: object) -> bool:
    """Return whether a value is a whole number, such as 480 or 480.0."""
    return _number(value) and value == int(value)


def _categories(path: str, entries: list[Any]) -> dict[int, str]:
    """Return names by id; raise if one is invalid."""
    names: dict[int, str] = {}
    for entry in entries:
        number = entry.get("id") if isinstance(entry, dict) else None
        problem = None
        if not _whole(number) or number < 0:
            problem = "its id must be a whole number, 0 or more: it is the class number"
        elif number in names:
            problem = f"{names[number]!r} has the same id"
        elif number > _LARGEST:
            problem = (
                f"ids are class numbers, and a model would have {number + 1} classes: renumber "
                f"them, to {_LARGEST} at most"
            )
        if problem is not None:
            raise UserError(f"annotations: {path!r} has the category {entry!r}; {problem}")
        names[int(number)] = str(entry.get("name", number))
    return names


def _images(entries: list[Any], problems: list[str]) -> dict[int, tuple[str, int, int]]:
    """Return (file name, height, width) by image id."""
    images: dict[int, tuple[str, int, int]] = {}
    for place, entry in enumerate(entries):
        entry = entry if isinstance(entry, dict) else {}
        number, name = entry.get("id"), entry.get("file_name")
        size = entry.get("height"), entry.get("width")
        problem = None
        if not _whole(number):
            problem = "its id is not a whole number"
        elif not isinstance(name, str) or not name:
            problem = "it has no file_name"
        elif not all(_whole(side) and side > 0 for side in size):
            problem = f"its height and width are {size[0]!r} and {size[1]!r}"
        elif number in images:
            problem = f"{images[number][0]!r} has the same id"
        if problem is not None:
            problems.append(f"image {number!r} ({name!r}, number {place} of the list): {problem}")
        else:
            images[int(number)] = (name, *map(int, size))
    return images


def _check_annotation(entry: Any, images: dict[int, Any], categories: dict[int, str]) -> str | None:
    """Return why an annotation is invalid, or None."""
    if not isinstance(entry, dict):
        return f"{entry!r} is not an annotation"
    number, category, box = entry.get("image_id"), entry.get("category_id"), entry.get("bbox")
    if not _whole(number) or number not in images:
        return f"there is no image {number!r}"
    if not _whole(category) or category not in categories:
        return f"there is no category {category!r}"
    name, rows, columns = images[number]
    reason = _check_box(box, rows, columns)
    if reason is not None:
        return f"its box {box!r} in image {number} ({name!r}) {reason}"
    if _optional(entry.get("area"), 0) is None:
        return f"its area {entry['area']!r} is not a number"
    if _optional(entry.get("iscrowd"), 0) not in (0, 1):
        return f"its iscrowd {entry['iscrowd']!r} is not 0 or 1"
    return None


def _check_box(box: Any, rows: int, columns: int) -> str | None:
    if not isinstance(box, list) or len(box) != 4 or not all(map(_number, box)):
        return "is not four numbers"
    x, y, width, height = box
    if width <= 0 or height <= 0:
        return "has no area"
    if x >= columns or y >= rows or x + width <= 0 or y + height <= 0:
        return f"is outside of its {columns} x {rows} pixels"
    return None
