"""Small COCO data sets on disk: an instances file, and images in a folder or an archive."""

import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 1, "name": "ant"}, {"id": 3, "name": "bee"}, {"id": 90, "name": "cow"}]


def entry(number: int, width: int = 20, height: int = 16) -> dict:
    return {"id": number, "file_name": f"{number}.png", "width": width, "height": height}


def box(number: int, image: int, bbox=(2, 3, 5, 7), category: int = 3, **more) -> dict:
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": list(bbox),
        "area": 30.5,
        "iscrowd": 0,
        **more,
    }


def instances() -> dict:
    """Three images, the last first and the second without boxes; four annotations, one a crowd."""
    return {
        "images": [entry(30), entry(10), entry(20, width=12, height=24)],
        "annotations": [
            box(1, 10),
            box(2, 30, (0, 0, 20, 16), 1),
            box(3, 10, (1.25, 2.5, 3.75, 4.5), 90),
            box(4, 30, (4, 4, 8, 8), 3, iscrowd=1),
        ],
        "categories": CATEGORIES,
    }


def write_set(root: Path, data: dict | None = None) -> tuple[str, str]:
    """Write a set whose pixels are noise of the image's number; return images, annotations."""
    data = data or instances()
    folder = root / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for image in data["images"]:
        pixels = np.random.default_rng(image["id"]).integers(
            0, 256, (image["height"], image["width"], 3), dtype=np.uint8
        )
        Image.fromarray(pixels).save(folder / image["file_name"])
    (root / "instances.json").write_text(json.dumps(data))
    return str(folder), str(root / "instances.json")


def zip_folder(folder: str, archive: Path, top: str = "") -> str:
    """Put a folder's files into an archive, below its folder ``top``."""
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(Path(folder).iterdir()):
            file.write(path, f"{top}{path.name}")
    return str(archive)
