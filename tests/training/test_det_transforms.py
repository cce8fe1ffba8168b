"""DETR's transforms against written-out rules."""

from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from common import refuses
from PIL import Image
from torchvision.transforms import v2

from training.data.coco import Annotations
from training.data.detection import (
    DetectionTransform,
    RandomSizeCrop,
    ShorterSide,
    make_transform,
    resized_size,
)
from training.det.options import DetAugConfig
from training.errors import UserError
from training.seeding import forked

PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}


def training_transform(**options) -> DetectionTransform:
    return make_transform(DetAugConfig(**options), training=True)


def evaluation_transform(**options) -> DetectionTransform:
    return make_transform(DetAugConfig(**options), training=False)


def annotations(boxes, categories=None, crowd=None) -> Annotations:
    count = len(boxes)
    return Annotations(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(list(categories or range(1, count + 1)), dtype=torch.int64),
        torch.tensor(crowd or [False] * count, dtype=torch.bool),
        torch.ones(count),
        77,
    )


def picture(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def corners(target: dict, height: int, width: int) -> list[list[float]]:
    """Boxes of a target as x0, y0, x1, y1 in pixels of an image."""
    return [
        [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
        for x, y, w, h in target["boxes"].tolist()
    ]


# --- sizes ---------------------------------------------------------------------------------------

# height, width, size, max_size -> height, width; worked out by hand
SIZES = [
    (480, 640, 800, 1333, (800, 1066)),
    (640, 480, 800, 1333, (1066, 800)),
    (427, 640, 800, 1333, (800, 1199)),
    (480, 640, 480, 1333, (480, 640)),
    (500, 500, 608, 1333, (608, 608)),
    (640, 1500, 800, 1333, (569, 1333)),
    # 466.55 is rounded up, and the longer side then exceeds the most by one, as in the original.
    (350, 1000, 800, 1333, (467, 1334)),
    # 2.5 is rounded to even.
    (10, 400, 90, 100, (2, 80)),
    (350, 1000, 800, None, (800, 2285)),
    (1, 5000, 800, 1333, (1, 5000)),
]


@pytest.mark.parametrize(("height", "width", "size", "most", "expected"), SIZES)
def test_sizes_by_hand(height: int, width: int, size: int, most: int | None, expected):
    assert resized_size(height, width, size, most) == expected
    assert resized_size(width, height, size, most) == expected[::-1]


def test_sizes_in_exact_arithmetic():
    rng = np.random.default_rng(0)
    limited = 0
    for _ in range(3000):
        height, width = rng.integers(40, 2000, 2).tolist()
        size, most = rng.integers(200, 900), int(rng.integers(300, 1400))
        short, long = min(height, width), max(height, width)
        side = int(size)
        if Fraction(long, short) * side > most:
            side, limited = round(Fraction(most * short, long)), limited + 1
        longer = side * long // short
        expected = (side, longer) if width > height else (longer, side)
        assert resized_size(height, width, int(size), most) == expected
    assert 500 < limited < 2500


def test_pixels_are_pils():
    image = picture(30, 44)
    found, _ = evaluation_transform(eval_size=41, max_size=49, **PLAIN)(image, annotations([]))
    expected = np.asarray(image.resize((48, 33), Image.Resampling.BILINEAR))
    assert (np.asarray((found * 255).round().byte().permute(1, 2, 0)) == expected).all()


def test_evaluation_only_resizes_and_normalises():
    image = picture(30, 40)
    transform = evaluation_transform()
    with forked(0):
        found, target = transform(image, annotations([(4, 6, 8, 12)], [5]))
    with forked(1):
        again, _ = transform(image, annotations([(4, 6, 8, 12)], [5]))
    assert torch.equal(found, again)
    assert found.shape == (3, 800, 1066)
    assert found.dtype == torch.float32
    plain, _ = evaluation_transform(**PLAIN)(image, annotations([]))
    for channel in range(3):
        expected = (plain[channel] - DetAugConfig().mean[channel]) / DetAugConfig().std[channel]
        assert torch.allclose(found[channel], expected, atol=1e-5)
    # In units of the image: the same at each size, but for the rounding of 1066.67.
    assert target["boxes"][0].tolist() == pytest.approx([8 / 40, 12 / 30, 8 / 40, 12 / 30])
    assert target["labels"].tolist() == [5]
    assert (target["image_id"], target["size"]) == (77, (30, 40))


# --- boxes ---------------------------------------------------------------------------------------


def test_flip():
    image, found = picture(20, 30), annotations([(0, 2, 5, 7), (10.5, 0, 19.5, 20)])
    flip = v2.RandomHorizontalFlip(1.0)
    same, straight = DetectionTransform([], **PLAIN)(image, found)
    flipped, mirrored = DetectionTransform([flip], **PLAIN)(image, found)
    twice, back = DetectionTransform([flip, flip], **PLAIN)(image, found)
    assert torch.equal(twice, same)
    assert torch.equal(back["boxes"], straight["boxes"])
    assert torch.equal(flipped, same.flip(-1))
    assert corners(mirrored, 20, 30) == [
        pytest.approx([25, 2, 30, 9], abs=1e-4),
        pytest.approx([0, 0, 19.5, 20], abs=1e-4),
    ]


def test_crop_clips_boxes_and_drops_what_vanishes():
    """Each box against the rule written out; the crop is found by its pixels."""
    height, width, smallest, largest = 24, 32, 6, 14
    numbered = np.arange(height * width).reshape(height, width)
    image = Image.fromarray(
        np.stack((numbered // 256, numbered % 256, numbered * 0), -1).astype("u1")
    )
    rng = np.random.default_rng(0)
    boxes = [(*rng.uniform(0, 20, 2).tolist(), *rng.uniform(0.5, 9, 2).tolist()) for _ in range(12)]
    transform = DetectionTransform([RandomSizeCrop(smallest, largest)], **PLAIN)
    shapes, kept_counts, places = set(), set(), []
    for seed in range(200):
        with forked(seed):
            found, target = transform(image, annotations(boxes, range(12)))
        rows, columns = found.shape[1:]
        first = (found[:, 0, 0] * 255).round().int().tolist()
        top, left = divmod(first[0] * 256 + first[1], width)
        expected, labels = [], []
        for number, (x, y, w, h) in enumerate(boxes):
            x0, x1 = max(x - left, 0), min(x + w - left, columns)
            y0, y1 = max(y - top, 0), min(y + h - top, rows)
            if x1 > x0 and y1 > y0:
                expected.append([x0, y0, x1, y1])
                labels.append(number)
        assert target["labels"].tolist() == labels
        assert np.array(corners(target, rows, columns)).ravel() == pytest.approx(
            np.array(expected).ravel(), abs=1e-4
        )
        shapes.add((rows, columns))
        places.append((top, left, height - rows - top, width - columns - left))
        kept_counts.add(len(labels))
    sides = {side for shape in shapes for side in shape}
    assert sides == set(range(smallest, largest + 1))
    assert any(rows != columns for rows, columns in shapes)
    assert len(kept_counts) > 5
    # All four edges of the image are reached, and not passed.
    assert [min(distances) for distances in zip(*places, strict=True)] == [0, 0, 0, 0]


def test_crop_of_a_small_image_is_the_image():
    image = picture(5, 9)
    found, _ = DetectionTransform([RandomSizeCrop(20, 30)], **PLAIN)(image, annotations([]))
    assert found.shape == (3, 5, 9)


def test_box_that_touches_the_crop_only_with_its_edge_is_dropped():
    crop = RandomSizeCrop(8, 8)
    crop.make_params = lambda inputs: {"top": 0, "left": 8, "height": 8, "width": 8}
    boxes = annotations([(0, 0, 8, 8), (0, 0, 8.25, 8), (16, 0, 4, 4), (15.5, 0, 4, 4)])
    _, target = DetectionTransform([crop], **PLAIN)(picture(8, 24), boxes)
    assert target["labels"].tolist() == [2, 4]


def test_crowds_are_no_targets():
    found = annotations([(0, 0, 5, 5), (1, 1, 6, 6)], [3, 4], [True, False])
    _, target = evaluation_transform(eval_size=10)(picture(10, 10), found)
    assert target["labels"].tolist() == [4]
    _, none = evaluation_transform(eval_size=10)(
        picture(10, 10), annotations([(0, 0, 5, 5)], [3], [True])
    )
    assert none["boxes"].shape == (0, 4)


def test_no_boxes_pass_through_everything():
    transform = training_transform(
        scales=(8, 12), max_size=20, crop_scales=(10,), crop_size=(6, 9), crop_prob=1.0, hflip=1.0
    )
    for seed in range(5):
        with forked(seed):
            _, target = transform(picture(10, 14), annotations([]))
        assert (target["boxes"].shape, target["boxes"].dtype) == ((0, 4), torch.float32)
        assert (target["labels"].shape, target["labels"].dtype) == ((0,), torch.int64)


def test_boxes_stay_on_what_they_enclose():
    """A bright rectangle through the whole recipe: its box encloses its pixels."""
    pixels = np.zeros((60, 80, 3), dtype=np.uint8)
    pixels[20:44, 16:58] = 255
    transform = training_transform(
        scales=(50, 70, 90), max_size=110, crop_scales=(50, 60), crop_size=(30, 50), **PLAIN
    )
    seen, cropped = set(), 0
    for seed in range(80):
        with forked(seed):
            image, target = transform(Image.fromarray(pixels), annotations([(16, 20, 42, 24)]))
        _, rows, columns = image.shape
        bright = image[0] > 0.5
        across, down = bright.any(0).nonzero().ravel(), bright.any(1).nonzero().ravel()
        hull = [across[0].item(), down[0].item(), across[-1].item() + 1, down[-1].item() + 1]
        assert corners(target, rows, columns) == [pytest.approx(hull, abs=1.5)]
        seen.add(min(rows, columns))
        cropped += bool(bright[0].any() or bright[:, 0].any() or bright[-1].any())
        assert max(rows, columns) <= 111
    # 110 keeps very long crops from reaching the sizes that were drawn.
    assert {50, 70} <= seen
    assert 10 < cropped < 60


def test_crop_comes_before_the_last_resize_in_half_of_the_cases():
    image, nothing = picture(64, 64), annotations([])
    transform = training_transform(
        scales=(64,), max_size=9999, crop_scales=(80,), crop_size=(40, 60)
    )
    shapes = []
    for seed in range(300):
        with forked(seed):
            shapes.append(tuple(transform(image, nothing)[0].shape[1:]))
    # Without a crop a square stays one; with one only where both sides were drawn alike.
    uncropped = sum(shape == (64, 64) for shape in shapes)
    assert 120 < uncropped < 190
    assert all(min(shape) == 64 for shape in shapes)


def test_shorter_side_draws_all_sizes():
    resize, sizes = ShorterSide((4, 5, 6)), set()
    for seed in range(40):
        with forked(seed):
            sizes.add(resize(picture(8, 8)).size)
    assert sizes == {(4, 4), (5, 5), (6, 6)}


# --- options -------------------------------------------------------------------------------------

BAD_OPTIONS = [
    ({"scales": ()}, ["aug.scales", "()"]),
    ({"scales": (480, 0)}, ["scales", "(480, 0)"]),
    ({"max_size": 0}, ["max_size", "0"]),
    ({"crop_scales": [-1]}, ["crop_scales", "[-1]"]),
    ({"crop_size": (600, 384)}, ["crop_size", "600, 384"]),
]


@pytest.mark.parametrize(("options", "parts"), BAD_OPTIONS)
def test_bad_options(options: dict, parts: list[str]):
    refuses(partial(training_transform, **options), *parts, error=UserError)


def test_bad_evaluation_size():
    with pytest.raises(UserError, match="aug.eval_size: 0"):
        evaluation_transform(eval_size=0)
