"""Scenes with items of Fashion-MNIST in COCO's format, for benchmarks/detection.py.

A scene has 64x64 pixels: smooth noise, strokes, pieces of other items, and one to four items of 14
to 42 pixels, which may cover up to two fifths of each other. Training scenes have training images,
held-out scenes test images. A scene depends only on (seed, split, number).
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from PIL import Image

from training.data.fashion import NAMES, Fashion
from training.data.painting import background, overlap
from training.seeding import derive

SIZE = 64
ITEMS = (1, 4)
SIDES = (14, 42)  # pixels; the largest is three times the smallest
COVERED = 0.4  # of the smaller of two boxes, at most
CLUTTER = 4
TRIES = 60
DARK = 12  # of 255: darker pixels of an image are background
SPLITS = {"train": ("train+validation", 4000), "val": ("test", 500)}


def write(folder: Path, seed: int = 0, counts: dict[str, int] | None = None) -> Path:
    """Write ``train2017``, ``val2017`` and ``annotations`` into a folder, unless they are there."""
    done = folder / "annotations" / "instances_val2017.json"
    if done.exists():
        return folder
    done.parent.mkdir(parents=True, exist_ok=True)
    for name, (split, count) in SPLITS.items():
        images = folder / f"{name}2017"
        images.mkdir(exist_ok=True)
        data = _write(images, Fashion(split), seed, (counts or {}).get(name, count))
        done.with_name(f"instances_{name}2017.json").write_text(json.dumps(data))
    return folder


def _write(folder: Path, source: Fashion, seed: int, count: int) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, count + 1):
        scene, items = paint(source, np.random.default_rng(derive(seed, folder.name, number)))
        name = f"{number:06}.png"
        scene.save(folder / name)
        images.append({"id": number, "file_name": name, "width": SIZE, "height": SIZE})
        for kind, box in items:
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": kind, "bbox": box,
                 "area": box[2] * box[3], "iscrowd": 0}
            )  # fmt: skip
    names = [{"id": number, "name": name} for number, name in enumerate(NAMES)]
    return {"images": images, "annotations": annotations, "categories": names}


def paint(
    source: Fashion, rng: np.random.Generator
) -> tuple[Image.Image, list[tuple[int, tuple[int, int, int, int]]]]:
    """Paint one scene; return it and its items: class and box (x, y, width, height)."""
    chosen = rng.integers(len(source), size=int(rng.integers(ITEMS[0], ITEMS[1] + 1)) + 2).tolist()
    drawn = [source.read(index) for index in chosen]
    canvas = background(rng, SIZE, CLUTTER, [image for image, _ in drawn[-2:]])
    items: list[tuple[int, tuple[int, int, int, int]]] = []
    for image, kind in drawn[:-2]:
        for _ in range(TRIES):
            grey, alpha = cut(image, int(rng.integers(SIDES[0], SIDES[1] + 1)))
            height, width = alpha.shape
            left, top = (int(rng.integers(SIZE - side + 1)) for side in (width, height))
            box = (left, top, width, height)
            if all(overlap(box, other) <= COVERED for _, other in items):
                tint = rng.uniform(0.7, 1.0, 3) * grey[..., None]
                part = canvas[top : top + height, left : left + width]
                part += alpha[..., None] * (tint - part)
                items.append((kind, box))
                break
    return Image.fromarray(np.uint8(np.clip(np.rint(canvas), 0, 255))), items


def cut(image: Image.Image, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the item of an image, ``side`` pixels at its longer side: grey levels and opacity."""
    pixels = np.asarray(image)
    shown = pixels > DARK
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    part = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    height, width = pixels[part].shape
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # Grey levels start at 60, so that black clothes differ from the background.
    grey = 60 + pixels[part].astype(np.float32) * (195 / 255)
    return tuple(
        np.asarray(
            Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
        )
        for values in (grey, shown[part])
    )  # type: ignore[return-value]
