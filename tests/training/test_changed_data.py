"""A run that is resumed on other data than it was started on says so."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from coco_files import instances, write_set, zip_folder
from PIL import Image
from test_train_det import TINY as DET_TINY

from training.data.coco import open_coco
from training.data.digest import array_digest, changes, parts_below, stat_digest
from training.data.sources import data_digest, open_source


def paint(path: Path, value: int = 7, size: tuple[int, int] = (12, 9)) -> None:
    Image.fromarray(np.full((*size, 3), value, dtype=np.uint8)).save(path)


def later(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def save_without_a_crowd(root: Path) -> None:
    data = instances()
    data["annotations"].pop()
    (root / "instances.json").write_text(json.dumps(data))


def pack(folder: Path) -> None:
    for split in ("train", "val"):
        with tarfile.open(folder / f"{split}.tar", "w") as file:
            file.add(folder / split, arcname=".")
        shutil.rmtree(folder / split)


SAME_COUNT = "files, but some of them changed"
CLASSES = {
    "removed": (lambda f: (f / "train/bee/0.png").unlink(), "train/bee' had 6 files, has 5"),
    "added": (lambda f: paint(f / "val/ant/new.png"), "val/ant' had 5 files, has 6"),
    "painted": (lambda f: paint(f / "train/ant/1.png"), f"train/ant' still has 6 {SAME_COUNT}"),
    "another time": (lambda f: later(f / "val/bee/2.png"), f"val/bee' still has 5 {SAME_COUNT}"),
    "renamed": (
        lambda f: (f / "train/ant/1.png").rename(f / "train/ant/9.png"),
        f"train/ant' still has 6 {SAME_COUNT}",
    ),
    "archive": (lambda f: later(f / "train.tar"), "train.tar' changed"),
}
COCO = {
    "annotations": (save_without_a_crowd, "instances.json' changed"),
    "removed": (lambda f: (f / "images/20.png").unlink(), "instances.json' had 3 files, has 2"),
    "painted": (lambda f: paint(f / "images/20.png"), f"instances.json' still has 3 {SAME_COUNT}"),
    "archive": (lambda f: later(f / "images.zip"), "images.zip' changed"),
}


@pytest.mark.parametrize("change", CLASSES)
def test_class_folders(change, folder: Path):
    def digest():
        sources = [
            open_source("folder", str(folder), split, training=False) for split in ("train", "val")
        ]
        return data_digest(sources, str(folder))

    if change == "archive":
        pack(folder)
    before = digest()
    assert digest() == before
    act, line = CLASSES[change]
    act(folder)
    (told,) = changes(before, digest())
    assert line in told


@pytest.mark.parametrize("change", COCO)
def test_coco(change, tmp_path: Path):
    images, annotations = write_set(tmp_path)
    if change == "archive":
        images = zip_folder(images, tmp_path / "images.zip")
    before = open_coco(images, annotations).digest()
    assert open_coco(images, annotations).digest() == before
    act, line = COCO[change]
    act(tmp_path)
    (told,) = changes(before, open_coco(images, annotations).digest())
    assert line in told


def test_a_classifier_refuses_and_resumes(cls, folder: Path, tmp_path: Path):
    options = ["--model.in_chans=3", "--data.name=folder", "--batch_size=4", "--run.experiment=x"]
    options += [f"--data.root={folder}"]
    resumed = [*options, f"--resume={tmp_path / 'runs/x'}"]
    assert cls(*options, "--epochs=1")[0] == 0
    assert cls(*resumed, "--epochs=2")[0] == 0  # of the same data
    act, line = CLASSES["removed"]
    act(folder)
    status, _, err = cls(*resumed, "--epochs=3")
    assert status == 2 and err.count("\n") == 1
    assert line in err and "--allow-changed-data" in err
    status, _, err = cls(*resumed, "--epochs=3", "--allow-changed-data")
    assert status == 0 and line in err
    status, _, err = cls(*resumed, "--epochs=4")  # the new state is of the changed data
    assert status == 0 and "changed" not in err


def test_a_detector_refuses_and_resumes(tmp_path: Path, capsys):
    import train_det

    options = [*DET_TINY, "--data.name=coco", "--batch_size=2", "--run.experiment=x"]
    options += [f"--run.output={tmp_path / 'runs'}", "--pictures=0"]
    for part in ("train", "val"):
        images, annotations = write_set(tmp_path / part)
        options += [f"--data.{part}_images={images}", f"--data.{part}_annotations={annotations}"]
    assert train_det.main([*options, "--epochs=1"]) == 0
    options += [f"--resume={tmp_path / 'runs/x'}", "--epochs=2"]
    act, line = COCO["annotations"]
    act(tmp_path / "train")
    capsys.readouterr()
    assert train_det.main(options) == 2
    assert line in capsys.readouterr().err
    assert train_det.main([*options, "--allow-changed-data"]) == 0
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "now", "lines"),
    [
        ({"a": (1, "x")}, {"a": (1, "x")}, []),
        ({}, {"a": (2, "x")}, ["'a' had 0 files, has 2"]),
        ({"a": (1, "x"), "b": (2, "y")}, {"b": (2, "z")},
         ["'a' had 1 file, has 0", "'b' still has 2 files, but some of them changed"]),
        ({"a": (1, "x")}, {"a": (1, "y")}, ["'a' changed"]),
    ],
)  # fmt: skip
def test_changes(before, now, lines):
    assert changes(before, now) == lines


def test_digests(tmp_path: Path):
    (tmp_path / "shards").mkdir()
    for name in ("one", "shards/two", "shards/three"):
        (tmp_path / name).write_text(name)
    parts = parts_below(str(tmp_path))
    assert {Path(part).name: len(files) for part, files in parts.items()} == {"one": 1, "shards": 2}
    assert stat_digest(parts) == stat_digest(parts)
    assert parts_below(str(tmp_path / "one")) == {str(tmp_path / "one"): [str(tmp_path / "one")]}
    assert parts_below(str(tmp_path / "nowhere")) == {}
    before = stat_digest(parts)
    later(tmp_path / "one")
    (told,) = changes(before, stat_digest(parts))
    assert told.startswith(repr(str(tmp_path / "one")))
    arrays = {"a": [np.arange(3)], "b": [np.arange(4), np.ones(2)]}
    assert array_digest(**arrays) == array_digest(**arrays)
    arrays["b"][1][0] = 2
    assert changes(array_digest(a=[np.arange(3)], b=[np.arange(4), np.ones(2)]),
                   array_digest(**arrays)) == ["'b' changed"]  # fmt: skip


def test_the_option_needs_a_resumed_run(cls):
    status, _, err = cls("--allow-changed-data")
    assert status == 2 and "allow_changed_data: True has no effect with resume: null" in err
