"""The embedded detection set: scikit-learn's digits in cluttered scenes, in COCO's own format.

Written once, as images and instances files, into a folder of its own. A scene depends on (seed,
split, number) only. Held-out scenes are made of held-out digits, their clutter too. Category n is
the digit n: a category id is a class number, so there are 10 classes and none goes unused.
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

# To be raised when scenes are painted otherwise; sets that were made before are then made again.
VERSION = 2
_STAMP = "scenes.json"


SIZE = 64  # sides of a scene in pixels
DIGITS = 1, 3  # least and most digits in a scene; fewer where there is no room for them
HEIGHTS = 14, 30  # least and greatest height of a digit in pixels
CLUTTER = 4  # strokes and fragments of digits in a scene, at most


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """How many scenes a set has, and the seed that they are painted with."""

    train: int = 4000
    held_out: int = 500
    seed: int = 0


def make_scenes(
    folder: str | Path,
    scenes: Scenes | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Make sure that ``folder`` holds a set of scenes.

    It has the folders train and val, and annotations/instances_train.json and _val.json. A set of
    other parameters or of another version is made again. Processes may call this at once: one
    makes the set while the others wait.

    Args:
        say: prints that a set is being made.

    Raises:
        UserError: if the folder cannot be written, or holds something else.
    """
    scenes, folder = scenes or Scenes(), Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if _is_made(folder, scenes):
                return
            say(f"painting {scenes.train} + {scenes.held_out} scenes of digits into {folder}")
            # Only the holder of the lock gets here, so what is left of an interrupted one can go.
            unfinished = folder.parent / f".{folder.name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            _write(unfinished, scenes)
            if folder.exists():
                shutil.rmtree(folder)
            os.rename(unfinished, folder)
    except OSError as error:
        raise UserError(f"scenes cannot be written to {str(folder)!r}: {error}") from error


def scene_paths(folder: str | Path, split: str) -> tuple[str, str]:
    """Images and instances file of the split "train" or "validation", for ``open_coco``."""
    name = "train" if split == "train" else "val"
    return (
        os.path.join(folder, name),
        os.path.join(folder, "annotations", f"instances_{name}.json"),
    )


def paint_scene(digits: Digits, scenes: Scenes, number: int) -> tuple[Image.Image, list[Placed]]:
    """Paint one scene of the digits of a split."""
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
    """Whether the set is there. Raises for a folder of something else, which must not go."""
    try:
        return json.loads((folder / _STAMP).read_text()) == _stamp(scenes)
    except FileNotFoundError:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(
                f"{str(folder)!r} holds something that is no set of scenes; "
                "name another folder, or remove it"
            ) from None
    except ValueError:
        pass
    return False


def _stamp(scenes: Scenes) -> dict[str, Any]:
    # As read from a file: with lists instead of tuples.
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
                    # Which of scikit-learn's 1,797 scans it is.
                    "scan": item.scan,
                }
            )
    return {
        "info": {"description": "scikit-learn's digits in cluttered scenes", "version": VERSION},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": digit, "name": str(digit)} for digit in range(CLASSES)],
    }
