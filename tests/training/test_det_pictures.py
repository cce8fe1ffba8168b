"""Pictures of a detector show the boxes that there are, where they are."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image

from training.det.pictures import (
    COLOURS,
    Example,
    _draw,
    draw_detections,
    draw_precision_recall,
)
from training.report import DETECTOR, draw_curves

NAMES = {0: "nought", 1: "one $ or two $"}  # not mathematics
GREY = 0.5


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def example(truth=(), found=(), image=None, scores=None) -> Example:
    def of(parts):
        boxes = torch.tensor([box for _, box in parts], dtype=torch.float32).reshape(-1, 4)
        return {"labels": torch.tensor([n for n, _ in parts], dtype=torch.int64), "boxes": boxes}

    scores = torch.ones(len(found)) if scores is None else torch.tensor(scores)
    image = torch.full((3, 64, 64), GREY) if image is None else image
    return Example("image 7", image, of(truth), {**of(found), "scores": scores})


def test_boxes_are_drawn_where_they_are():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    boxes = torch.tensor([[10.0, 20.0, 30.0, 40.0], [50.0, -9.0, 99.0, 12.0]])
    shown = example(image=torch.full((3, 50, 64), GREY))
    _draw(axes, shown, boxes, [0, 1], ["a", "b"])
    rims = [(patch.get_xy(), patch.get_width(), patch.get_height()) for patch in axes.patches]
    # What is outside is cut off at the image's edge.
    assert rims == [((10, 20), 20, 20)] * 2 + [((50, 0), 14, 12)] * 2
    colours = [to_hex(patch.get_edgecolor()).upper() for patch in axes.patches]
    assert colours == ["#000000", COLOURS[0], "#000000", COLOURS[1]]
    assert axes.get_xlim() == (0, 64) and axes.get_ylim() == (50, 0)
    assert [text.xy for text in axes.texts] == [(10, 20), (64, 0)]


def test_objects_are_at_the_left_and_detections_at_the_right(tmp_path: Path):
    box = (20, 20, 50, 50)
    draw_detections([example([(0, box)], [(1, box)])], tmp_path / "a.png", NAMES)
    sheet = pixels(tmp_path / "a.png")
    assert sheet.shape[1] == 870
    for colour, left in ((COLOURS[0], True), (COLOURS[1], False)):
        columns = np.nonzero((sheet == rgb(colour)).all(-1).any(0))[0]
        assert len(columns) > 20
        assert ((columns < sheet.shape[1] / 2) == left).all()


@pytest.mark.parametrize(
    ("box", "score"), [((5, 5, 20, 20), 0.49), ((5, 5, float("nan"), 20), 0.9)]
)
def test_what_is_below_the_threshold_is_not_drawn(box, score, tmp_path: Path):
    draw_detections([example()], tmp_path / "none.png", NAMES)
    draw_detections([example([], [(1, box)], scores=[score])], tmp_path / "low.png", NAMES)
    assert np.array_equal(pixels(tmp_path / "low.png"), pixels(tmp_path / "none.png"))
    draw_detections([example([], [(1, (5, 5, 20, 20))], scores=[0.5])], tmp_path / "a.png", NAMES)
    assert not np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "none.png"))


def test_a_sheet_of_many_sizes(tmp_path: Path):
    images = [(3, 64, 64), (3, 480, 640), (1, 33, 20), (3, 300, 900), (3, 5, 7)]
    examples = [
        example([(9, (1, 1, 4, 4))], [(2, (0, 0, 3, 3))], torch.rand(size)) for size in images
    ]
    heights = []
    for count in (1, 2, 3, 5):
        draw_detections(examples[:count], tmp_path / f"{count}.png", NAMES)
        height, width, _ = pixels(tmp_path / f"{count}.png").shape
        heights.append(height)
        assert width < 1800
    assert heights[0] < heights[1] and heights[2] < heights[3]
    draw_detections([], tmp_path / "nothing.png", NAMES)
    assert not (tmp_path / "nothing.png").exists()


def test_precision_against_recall(tmp_path: Path):
    recall = np.linspace(0, 1, 101).tolist()
    values = {"AP50": [1.0] * 101, "AP75": [0.8] * 60 + [0.0] * 41, "AP": [0.5] * 101}
    draw_precision_recall({"recall": recall, **values}, tmp_path / "a.png", "some")
    nothing = {name: [float("nan")] * 101 for name in values}
    draw_precision_recall({"recall": recall, **nothing}, tmp_path / "b.png", "none")
    a, b = pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png")
    assert a.shape == b.shape == (750, 825, 3)
    assert len(np.unique(a.reshape(-1, 3), axis=0)) > len(np.unique(b.reshape(-1, 3), axis=0)) > 10


def test_curves_of_a_detector(tmp_path: Path):
    whole = {"train_loss": 9.0, **dict.fromkeys(DETECTOR, 0.5), "ema_AP": 0.4}
    draw_curves([{"epoch": 1, **whole}], tmp_path / "a.png", "all six", DETECTOR)
    assert pixels(tmp_path / "a.png").shape == (1200, 2250, 3)
    # Only evaluated every other epoch, and no losses then.
    records = [{"epoch": 1, "train_loss": 9.0}, {"epoch": 2, "train_loss": 8.0, "AP": None}]
    draw_curves(records, tmp_path / "b.png", "two", DETECTOR)
    assert pixels(tmp_path / "b.png").shape == (600, 1500, 3)
