"""benchmarks/fashion_scenes.py on drawn items: boxes fit them, and the folder opens as COCO."""

import importlib

import numpy as np
import pytest
from PIL import Image

from training.data.coco import open_coco
from training.data.painting import overlap


class Drawn:
    """Bright rectangles of different sides, as Fashion-MNIST's images."""

    def __init__(self, split):
        self.split = split

    def __len__(self):
        return 20

    def read(self, index):
        pixels = np.zeros((28, 28), np.uint8)
        pixels[2 : 10 + index // 2, 3 : 20 - index // 4] = 200
        return Image.fromarray(pixels), index % 10


@pytest.fixture
def scenes(monkeypatch):
    monkeypatch.syspath_prepend("benchmarks")
    module = importlib.import_module("fashion_scenes")
    monkeypatch.setattr(module, "Fashion", Drawn)
    return module


def test_boxes(scenes):
    for seed in range(20):
        scene, items = scenes.paint(Drawn("test"), np.random.default_rng(seed))
        assert scene.size == (scenes.SIZE, scenes.SIZE) and 1 <= len(items) <= scenes.ITEMS[1]
        boxes = [box for _, box in items]
        for n, (left, top, width, height) in enumerate(boxes):
            assert scenes.SIDES[0] <= max(width, height) <= scenes.SIDES[1]
            assert left >= 0 <= top and left + width <= scenes.SIZE >= top + height
            assert all(overlap(boxes[n], other) <= scenes.COVERED for other in boxes[:n])


def test_the_folder_opens(scenes, tmp_path):
    folder = scenes.write(tmp_path / "scenes", counts={"train": 3, "val": 2})
    for name, count in (("train", 3), ("val", 2)):
        annotations = folder / "annotations" / f"instances_{name}2017.json"
        source = open_coco(str(folder / f"{name}2017"), str(annotations))
        assert len(source) == count and not source.left_out
    before = annotations.stat().st_mtime_ns
    scenes.write(folder, counts={"train": 9, "val": 9})
    assert annotations.stat().st_mtime_ns == before
