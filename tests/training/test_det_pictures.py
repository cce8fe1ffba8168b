"""Pictures of a detector show the boxes that there are, where they are."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training.curves import DETECTOR, draw_curves
from training.det.average_precision import PrecisionRecall
from training.det.pictures import (
    COLOURS,
    Example,
    boxed,
    draw_detections,
    draw_precision_recall,
    unnormalized,
)

NAMES = {0: "nought", 1: "one $ or two $"}  # not mathematics
GREY = 0.5
BLACK = (0, 0, 0)


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
    image = torch.full((3, 50, 64), GREY)
    boxes = torch.tensor([[10.0, 20.0, 30.0, 40.0], [50.0, -9.0, 99.0, 12.0]])
    drawn = boxed(image, boxes, COLOURS[:2], (300, 384))  # six times as large
    assert drawn.shape == (3, 300, 384) and drawn.dtype == torch.uint8
    first, second, grey = rgb(COLOURS[0]), rgb(COLOURS[1]), (128, 128, 128)

    def at(y, x):
        return tuple(drawn[:, y, x].tolist())

    # From pixel 60 to 179 and 120 to 239: two pixels of colour inwards, one of black at each side.
    for edge, inwards in ((60, 1), (179, -1)):
        line = [at(150, edge + inwards * step) for step in (-2, -1, 0, 1, 2, 3)]
        assert line == [grey, BLACK, first, first, BLACK, grey]
    for edge, inwards in ((120, 1), (239, -1)):
        line = [at(edge + inwards * step, 100) for step in (-2, -1, 0, 1, 2, 3)]
        assert line == [grey, BLACK, first, first, BLACK, grey]
    # What is outside is cut off at the picture's rim, where the line shows.
    assert at(0, 350) == at(30, 383) == at(71, 350) == at(30, 300) == second
    assert at(150, 200) == at(150, 20) == grey


def test_images_keep_their_shape():
    photo = torch.rand(3, 600, 1200)
    small = boxed(photo, torch.tensor([[0.0, 0.0, 1200.0, 600.0]]), COLOURS[:1], (200, 400))
    assert small.shape == (3, 200, 400)
    assert tuple(small[:, 100, 0].tolist()) == tuple(small[:, 199, 399].tolist()) == rgb(COLOURS[0])
    grey = torch.tensor([[[0, 255], [255, 0]]], dtype=torch.uint8)
    assert boxed(grey, torch.zeros(0, 4), [], (4, 4))[:, 0].tolist() == [[0, 0, 255, 255]] * 3
    empty = boxed(photo, torch.tensor([[5.0, 5.0, 5.0, 5.0]]), COLOURS[:1], (200, 400))
    assert tuple(empty[:, 2, 2].tolist()) == rgb(COLOURS[0])  # a box without area is a dot


def test_objects_are_at_the_left_and_detections_at_the_right(tmp_path: Path):
    box = (20, 20, 50, 50)
    draw_detections([example([(0, box)], [(1, box)])], tmp_path / "a.png", NAMES)
    sheet = pixels(tmp_path / "a.png")
    assert sheet.shape == (501, 837, 3)
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
        draw_detections(examples[:count], tmp_path / f"{count}.png", NAMES, title="a sheet")
        height, width, _ = pixels(tmp_path / f"{count}.png").shape
        heights.append(height)
        assert width < 1800
    assert heights[0] < heights[1] and heights[2] < heights[3]
    draw_detections([], tmp_path / "nothing.png", NAMES)
    assert not (tmp_path / "nothing.png").exists()


def test_images_come_back_from_normalization():
    image = torch.rand(3, 4, 5)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normal = (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(unnormalized(normal, mean, std), image)
    assert unnormalized(normal + 9, mean, std).max() == 1


def test_precision_against_recall(tmp_path: Path):
    recall = np.linspace(0, 1, 101).tolist()
    values = {"AP50": [1.0] * 101, "AP75": [0.8] * 60 + [0.0] * 41, "AP": [0.5] * 101}
    draw_precision_recall(PrecisionRecall(recall, values), tmp_path / "a.png", "some")
    nothing = {name: [float("nan")] * 101 for name in values}
    draw_precision_recall(PrecisionRecall(recall, nothing), tmp_path / "b.png", "none")
    a, b = pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png")
    assert a.shape == b.shape == (675, 825, 3)
    assert len(np.unique(a.reshape(-1, 3), axis=0)) > len(np.unique(b.reshape(-1, 3), axis=0)) > 10


def test_curves_of_a_detector(tmp_path: Path):
    names = [panel.name for panel in DETECTOR]
    whole = {"train_loss": 9.0, **dict.fromkeys(names, 0.5), "ema_AP": 0.4}
    draw_curves([{"epoch": 1, **whole}], tmp_path / "a.png", "all six", DETECTOR)
    assert pixels(tmp_path / "a.png").shape == (1200, 2250, 3)
    # Only evaluated every other epoch, and no losses then.
    records = [{"epoch": 1, "train_loss": 9.0}, {"epoch": 2, "train_loss": 8.0, "AP": None}]
    draw_curves(records, tmp_path / "b.png", "two", DETECTOR)
    assert pixels(tmp_path / "b.png").shape == (600, 1500, 3)
