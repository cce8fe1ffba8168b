"""The embedded detection set: scikit-learn's digits in cluttered scenes, in COCO's format.

It is written once into a folder, as images and instances files. A scene depends only on (seed,
split, number). Held-out scenes, with their clutter, have held-out digits. Category ids are the
digits 0 to 9.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from PIL import Image

from training.data.digits import CLASSES, Digits
from training.data.painting import Placed, background, paint, place_digits
from training.errors import UserError
from training.seeding import derive

# Increase it when the painting changes; older sets are then created again.
VERSION = 2
_STAMP = "scenes.json"


SIZE = 64  # side of a scene in pixels
DIGITS = 1, 3  # minimum and maximum number of digits in a scene; fewer if there is no space
HEIGHTS = 14, 30  # minimum and maximum height of a digit in pixels
CLUTTER = 4  # maximum number of strokes and fragments of digits in a scene


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Numbers of scenes of a set, and their seed."""

    train: int = 4000
    held_out: int = 500
    seed: int = 0


def make_scenes(
    folder: str | Path,
    scenes: Scenes | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Create a set of scenes in ``folder``, unless it exists.

    It has the folders train and val, and annotations/instances_train.json and _val.json. A set with
    other parameters or of another version is created again. Several processes may call this: one
    creates the set while the others wait.

    Args:
        scenes: parameters of the set; None: the defaults.
        say: prints a line before a set is created.

    Raises:
        UserError: if the folder cannot be written, or has other contents.
    """
    scenes, folder = scenes or Scenes(), Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if _is_made(folder, scenes):
                return
            say(f"painting {scenes.train} + {scenes.held_out} scenes of digits into {folder}")
            # This process has the lock, so an unfinished folder is from an interrupted one.
            unfinished = folder.parent / f".{folder.name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            _write(unfinished, scenes)
            if folder.exists():
                shutil.rmtree(folder)
            os.rename(unfinished, folder)
    except OSError as error:
        raise UserError(f"scenes cannot be written to {str(folder)!r}: {error}") from error


def scene_paths(folder: str | Path, split: str) -> tuple[str, str]:
    """Return images and instances file of "train" or "validation", for ``open_coco``."""
    name = "train" if split == "train" else "val"
    return (
        os.path.join(folder, name),
        os.path.join(folder, "annotations", f"instances_{name}.json"),
    )


def paint_scene(digits: Digits, scenes: Scenes, number: int) -> tuple[Image.Image, list[Placed]]:
    """Paint one scene with the digits of a split."""
    rng = np.random.default_rng(derive(scenes.seed, digits.split, number))
    count = int(rng.integers(DIGITS[0], DIGITS[1] + 1))
    chosen = rng.integers(len(digits), size=count + 2).tolist()
    drawn = [digits.read(index) for index in chosen]
    fragments = [image for image, _ in drawn[count:]]
    canvas = background(rng, SIZE, CLUTTER, fragments)
    wanted = [
        (int(digits.indices[index]), digit, image)
        for index, (image, digit) in zip(chosen[:count], drawn, strict=False)
    ]
    placed = place_digits(rng, wanted, SIZE, HEIGHTS)
    return paint(rng, canvas, placed), placed


def _is_made(folder: Path, scenes: Scenes) -> bool:
    """Return whether the set exists; raise if the folder has other contents."""
    try:
        return json.loads((folder / _STAMP).read_text()) == _stamp(scenes)
    except FileNotFoundError:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(
                f"{str(folder)!r} has other contents than a set of scenes; "
                "give another folder, or remove it"
            ) from None
    except ValueError:
        pass
    return False


def _stamp(scenes: Scenes) -> dict[str, Any]:
    # As read from a file, with lists for tuples.
    return json.loads(json.dumps({"version": VERSION, **asdict(scenes)}))


def _write(folder: Path, scenes: Scenes) -> None:
    for split, count in (("train", scenes.train), ("validation", scenes.held_out)):
        images, annotations = map(Path, scene_paths(folder, split))
        images.mkdir(parents=True)
        annotations.parent.mkdir(exist_ok=True)
        data = _write_images(images, Digits(split), scenes, count)
        annotations.write_text(json.dumps(data))
    (folder / _STAMP).write_text(json.dumps(_stamp(scenes), indent=1))


def _write_images(folder: Path, digits: Digits, scenes: Scenes, count: int) -> dict[str, Any]:
    """Write a split's images; return the content of its instances file."""
    images, annotations = [], []
    for number in range(1, count + 1):
        image, placed = paint_scene(digits, scenes, number)
        name = f"{number:06}.png"
        image.save(folder / name)
        images.append(
            {"id": number, "file_name": name, "width": image.width, "height": image.height}
        )
        for item in placed:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": item.digit,
                    "bbox": list(item.box),
                    "area": item.box[2] * item.box[3],
                    "iscrowd": 0,
                    # Number of the scan among scikit-learn's 1,797.
                    "scan": item.scan,
                }
            )
    return {
        "info": {"description": "scikit-learn's digits in cluttered scenes", "version": VERSION},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": digit, "name": str(digit)} for digit in range(CLASSES)],
    }
