"""Data of which 5 % of the files are damaged or odd, in ten ways: each bad one is named once."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_files import box, entry, write_set
from damaged import DAMAGED, KINDS, ODD, damage
from PIL import Image

from training.data.coco import open_coco
from training.data.loaders import make_loader
from training.data.seeded import BadImages, SeededDataset
from training.data.sources import open_source
from training.errors import UserError

PIXELS = np.array([[(40 * r, 30 * c, 120) for c in range(9)] for r in range(7)], dtype=np.uint8)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of 100 images, 10 of these 200 damaged or odd; and 10 to hold out."""
    for split, count in (("train", 100), ("val", 5)):
        for name in ("ant", "bee"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(PIXELS).save(folder / f"{number:03}.png")
    for number, name in enumerate(KINDS):
        damage(tmp_path / f"images/train/{('ant', 'bee')[number % 2]}/{9 * number:03}.png", name)
    return tmp_path / "images"


def bad_ones(images: Path) -> list[str]:
    return sorted(
        str(images / f"train/{('ant', 'bee')[number % 2]}/{9 * number:03}.png")
        for number, name in enumerate(KINDS)
        if name in DAMAGED
    )


def test_a_folder_of_images(cls, images: Path, tmp_path: Path):
    options = ["--data.name=folder", f"--data.root={images}", "--model.in_chans=3"]
    options += ["--batch_size=20", "--epochs=2"]
    status, out, err = cls(*options, "--run.experiment=x", "--run.progress=lines")
    assert status == 0, err
    assert "5 images did not decode" in out
    for name in bad_ones(images):
        lines = [line for line in err.splitlines() if name in line]
        assert len(lines) == 1 and "does not decode" in lines[0], lines
    skipped = json.loads((tmp_path / "runs" / "x" / "skipped.json").read_text())
    assert sorted(skipped) == bad_ones(images)
    assert all(reason and "\n" not in reason for reason in skipped.values())

    status, _, err = cls(*options, "--data.on_bad_image=fail")
    assert status == 2 and err.count("\n") == 1
    assert any(name in err for name in bad_ones(images)) and "data.on_bad_image: skip" in err


def close(image: Image.Image, name: str) -> bool:
    """Whether an image that was odd has the pixels it had before."""
    found, wanted = np.asarray(image).astype(int), PIXELS.astype(int)
    if name == "16 bits":
        grey = np.asarray(Image.fromarray(PIXELS).convert("L")).astype(int)
        return bool((found == grey[..., None]).all())
    return bool(abs(found - wanted).max() <= {"wrong extension": 0}.get(name, 40))


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_in_a_folder_and_in_coco(tmp_path: Path, name: str):
    path = tmp_path / "set" / "train" / "ant" / "1.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(PIXELS).save(path)
    damage(path, name)
    plain = open_source("folder", str(tmp_path / "set"), "train", training=True)
    folder, file = write_set(
        tmp_path / "coco",
        {
            "images": [entry(1, 9, 7), entry(2)],
            "annotations": [box(1, 1, (1, 1, 3, 3)), box(2, 2)],
            "categories": [{"id": 3, "name": "bee"}],
        },
    )
    there = Path(folder) / "1.png"
    Image.fromarray(PIXELS).save(there)
    damage(there, name)
    coco = open_coco(folder, file)
    for source in (plain, coco):
        if name in ODD:
            image = source.read(0)[0]
            assert image.mode == "RGB" and close(image, name)
            continue
        seen: list[str] = []
        bad = BadImages("skip")
        bad.say = seen.append
        dataset = SeededDataset(source, lambda image: torch.zeros(1), 0, replace=False)
        loader = make_loader(dataset, batch_size=2, training=False, seed=0, collate=list)
        for sample in (sample for _ in range(2) for batch in loader for sample in batch):
            bad.note(sample.bad)
        assert list(bad.seen) == [source.name(0)] and len(seen) == 1
        with pytest.raises(UserError, match="does not decode"):
            BadImages("fail").note(dataset[0, 0].bad)


def test_a_large_image_is_used_and_a_huge_one_is_not(tmp_path: Path, monkeypatch):
    """Past its limit PIL warns, past twice the limit it refuses."""
    (tmp_path / "train" / "ant").mkdir(parents=True)
    Image.fromarray(PIXELS).save(tmp_path / "train/ant/1.png")  # 63 pixels
    source = open_source("folder", str(tmp_path), "train", training=True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.warns(Image.DecompressionBombWarning):
        assert close(source.read(0)[0], "")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    with pytest.raises(OSError, match="DecompressionBombError.*63 pixels"):
        source.read(0)


@pytest.mark.parametrize("target", ["..", "../..", "."])
def test_a_folder_that_leads_back_to_itself(tmp_path: Path, target: str):
    (tmp_path / "train" / "ant").mkdir(parents=True)
    Image.fromarray(PIXELS).save(tmp_path / "train/ant/1.png")
    os.symlink(target, tmp_path / "train/ant/again")
    with pytest.raises(UserError, match="train/ant/again' points to its parent folder"):
        open_source("folder", str(tmp_path), "train", training=True)
    (tmp_path / "train/ant/again").unlink()
    os.symlink("ant", tmp_path / "train/bee")  # a link that leads elsewhere is fine
    assert len(open_source("folder", str(tmp_path), "train", training=True)) == 2
