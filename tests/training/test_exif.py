"""data.exif: the EXIF orientation of images is applied where it is asked for."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from coco_files import box, entry, instances
from PIL import ExifTags, Image

from training.data.coco import open_coco
from training.data.pixels import swaps_sides
from training.data.sources import TimmSource, open_source

PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
# The pixels after applying the orientation of the file (EXIF 2.3, 4.6.4).
TURNED = {
    1: PIXELS,
    2: PIXELS[:, ::-1],
    3: PIXELS[::-1, ::-1],
    4: PIXELS[::-1],
    5: PIXELS.transpose(1, 0, 2),
    6: PIXELS[::-1].transpose(1, 0, 2),
    7: PIXELS[::-1, ::-1].transpose(1, 0, 2),
    8: PIXELS[:, ::-1].transpose(1, 0, 2),
}


def write(path: Path, orientation: int | None) -> None:
    exif = Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(PIXELS).save(path, exif=exif)


@pytest.mark.parametrize("orientation", [None, *TURNED])
@pytest.mark.parametrize("kind", ["folder", "archive", "timm"])
def test_classification(kind, orientation, tmp_path: Path):
    path = tmp_path / "train" / "ant" / "0.png"
    write(path, orientation)
    root = tmp_path
    if kind == "archive":
        root = tmp_path / "train.tar"
        with tarfile.open(root, "w") as file:
            file.add(path, arcname="ant/0.png")
    for exif in (False, True):
        if kind == "timm":
            source = TimmSource([(Image.open(path), 0)], "RGB", exif=exif)
        else:
            source = open_source("folder", str(root), "train", training=False, exif=exif)
        expected = TURNED[orientation or 1] if exif else PIXELS
        assert np.array_equal(np.asarray(source.read(0)[0]), expected)


@pytest.mark.parametrize(
    ("orientation", "size", "exif", "problem"),
    [
        (1, (6, 4), False, None),
        (6, (6, 4), False, None),
        (6, (4, 6), True, None),
        (6, (4, 6), False, "its EXIF orientation swaps them, and data.exif: true would fit"),
        (8, (4, 6), False, "its EXIF orientation swaps them, and data.exif: true would fit"),
        (6, (6, 4), True, "its EXIF orientation swaps them, and data.exif: false would fit"),
        (3, (4, 6), False, "it has 6 x 4 pixels, but is annotated as 4 x 6"),
        (6, (5, 6), False, "it has 6 x 4 pixels, but is annotated as 5 x 6"),
    ],
)
def test_detection(orientation, size, exif, problem, tmp_path: Path):
    write(tmp_path / "images" / "1.png", orientation)
    data = {**instances(), "images": [entry(1, *size)], "annotations": [box(1, 1, (0, 0, 3, 3))]}
    (tmp_path / "instances.json").write_text(json.dumps(data))
    source = open_coco(str(tmp_path / "images"), str(tmp_path / "instances.json"), exif=exif)
    if problem is None:
        expected = TURNED[orientation] if exif else PIXELS
        assert np.array_equal(np.asarray(source.read(0)[0]), expected)
        return
    with pytest.raises(ValueError, match=f"{problem}$"):
        source.read(0)


def test_orientations_that_swap(tmp_path: Path):
    for orientation, turned in TURNED.items():
        write(tmp_path / "a.png", orientation)
        swaps = turned.shape != PIXELS.shape
        assert swaps_sides((tmp_path / "a.png").read_bytes()) == swaps


def test_a_run_gets_the_option(cls, folder: Path, monkeypatch):
    """Upright stripes lie down: the run trains on other images."""
    for path in folder.rglob("*.png"):
        write(path, 6)
    options = ["--data.name=folder", f"--data.root={folder}", "--model.in_chans=3"]
    options += ["--batch_size=4", "--epochs=1"]
    seen = []
    real = Image.Image.resize

    def resize(self, *given, **named):
        seen.append(self.size)
        return real(self, *given, **named)

    monkeypatch.setattr(Image.Image, "resize", resize)
    options.append("--aug.enabled=false")
    for exif, size in (("false", (6, 4)), ("true", (4, 6))):
        seen.clear()
        assert cls(*options, f"--data.exif={exif}")[0] == 0
        assert set(seen) == {size}
    status, _, err = cls("--data.exif")
    assert status == 2 and "data.exif: True has no effect with data.name: digits" in err
