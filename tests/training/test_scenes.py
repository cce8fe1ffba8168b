"""The embedded detection set: made once, the same each time, of the right digits."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cls_command import ROOT
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_iou

from training.data import scenes as module
from training.data.coco import open_coco
from training.data.digits import Digits
from training.data.painting import paint
from training.data.scenes import Scenes, make_scenes, paint_scene, scene_paths
from training.errors import UserError

FEW = Scenes(train=9, held_out=5)
DIGITS = Digits("train")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("scenes") / "data" / "digits-detection"
    make_scenes(path, FEW)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# --- what is on disk -----------------------------------------------------------------------------


def test_is_a_coco_data_set(folder: Path):
    assert sorted(path.name for path in folder.iterdir()) == [
        "annotations", "scenes.json", "train", "val",
    ]  # fmt: skip
    for split, count in (("train", 9), ("validation", 5)):
        source = open_coco(
            *scene_paths(folder, split), on_bad_annotation="fail", on_bad_image="fail"
        )
        assert len(source) == count
        assert source.categories == {digit: str(digit) for digit in range(10)}
        for index in range(count):
            image, found = source.read(index)
            assert image.size == (64, 64)
            assert 1 <= len(found.boxes) <= 3


def test_pycocotools_takes_it(folder: Path):
    _, file = scene_paths(folder, "validation")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(file)
        perfect = [
            {key: ann[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
            for ann in truth.anns.values()
        ]
        evaluation = COCOeval(truth, truth.loadRes(perfect), "bbox")
        evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


def test_made_again_it_is_the_same_bit_by_bit(folder: Path, tmp_path: Path):
    make_scenes(tmp_path / "again", FEW)
    assert contents(tmp_path / "again") == contents(folder)
    make_scenes(tmp_path / "more", Scenes(train=11, held_out=5))
    more, few = contents(tmp_path / "more"), contents(folder)
    changed = {name for name in more if more[name] != few.get(name)}
    assert changed == {
        "scenes.json",
        "annotations/instances_train.json",
        "train/000010.png",
        "train/000011.png",
    }
    make_scenes(tmp_path / "other", Scenes(train=9, held_out=5, seed=1))
    other = contents(tmp_path / "other")
    assert not [name for name in few if name.endswith(".png") and other[name] == few[name]]


def test_scenes_do_not_move(folder: Path):
    """Results are measured on these scenes: other pixels need another VERSION."""
    found = {}
    for split in ("train", "validation"):
        data = json.loads(Path(scene_paths(folder, split)[1]).read_text())
        found[split] = [
            (ann["image_id"], ann["category_id"], ann["scan"], *ann["bbox"])
            for ann in data["annotations"][:3]
        ]
    assert module.VERSION == 2
    assert found == FIRST


# image, class, scan, x, y, width, height
FIRST = {
    "train": [
        (1, 6, 453, 45, 36, 12, 20),
        (2, 2, 1143, 22, 43, 14, 18),
        (2, 1, 731, 6, 20, 12, 25),
    ],
    "validation": [
        (1, 2, 132, 52, 42, 10, 20),
        (1, 6, 704, 4, 16, 10, 16),
        (1, 1, 1634, 31, 14, 7, 28),
    ],
}


# --- making it once ------------------------------------------------------------------------------


def times(folder: Path) -> set[int]:
    return {path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_is_made_once_and_again_only_if_stale(tmp_path: Path, monkeypatch):
    folder, said = tmp_path / "set", []
    make_scenes(folder, FEW, said.append)
    first = times(folder)
    make_scenes(folder, FEW, said.append)
    assert len(said) == 1
    assert str(folder) in said[0]
    assert times(folder) == first
    make_scenes(folder, Scenes(train=3, held_out=5), said.append)
    assert len(list((folder / "train").iterdir())) == 3
    monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
    make_scenes(folder, Scenes(train=3, held_out=5), said.append)
    assert len(said) == 3
    (folder / "scenes.json").write_text("{")
    make_scenes(folder, Scenes(train=3, held_out=5), said.append)
    assert len(said) == 4


def test_interrupted_making_leaves_nothing_behind(tmp_path: Path, monkeypatch):
    folder = tmp_path / "set"
    with monkeypatch.context() as patch:
        patch.setattr(module, "_stamp", lambda scenes: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make_scenes(folder, FEW)
    assert not folder.exists()
    make_scenes(folder, FEW)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == ["set"]


def test_something_else_is_not_replaced(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="mine' has other contents than a set of scenes"):
        make_scenes(tmp_path / "mine", FEW)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="file"):
            make_scenes(bad, FEW)
    (tmp_path / "empty").mkdir()
    make_scenes(tmp_path / "empty", FEW)
    assert (tmp_path / "empty" / "scenes.json").exists()


def test_two_processes_at_once_make_it_once(folder: Path, tmp_path: Path):
    code = (
        "from training.data.scenes import *; "
        f"make_scenes({str(tmp_path / 'set')!r}, Scenes(train=9, held_out=5), print)"
    )
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) for _ in range(2)]
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert b"".join(outputs).count(b"painting") == 1
    assert contents(tmp_path / "set") == contents(folder)


# --- what is in the scenes -----------------------------------------------------------------------


class Watched(Digits):
    """Digits that note which of them were read."""

    def __init__(self, split: str) -> None:
        super().__init__(split)
        self.read_scans: set[int] = set()

    def read(self, index: int):
        self.read_scans.add(int(self.indices[index]))
        return super().read(index)


def test_held_out_scenes_are_made_of_held_out_digits_only():
    used = {}
    for split in ("train", "validation"):
        digits = Watched(split)
        for number in range(1, 150):
            _, placed = paint_scene(digits, Scenes(), number)
            assert all(
                item.scan in digits.read_scans
                and digits.read(digits.indices.tolist().index(item.scan))[1] == item.digit
                for item in placed
            )
        used[split] = digits.read_scans
    train, held_out = (set(Digits(split).indices.tolist()) for split in ("train", "validation"))
    assert not train & held_out
    assert used["train"] <= train
    assert used["validation"] <= held_out
    assert min(len(scans) for scans in used.values()) > 100


def test_digits_overlap_little_and_come_in_all_classes_sizes_and_numbers():
    counts, heights, classes = set(), set(), set()
    for number in range(300):
        _, placed = paint_scene(DIGITS, Scenes(), number)
        boxes = torch.tensor([item.box for item in placed], dtype=torch.float64)
        boxes[:, 2:] += boxes[:, :2]
        assert boxes.min() >= 0
        assert boxes.max() <= 64
        assert box_iou(boxes, boxes).fill_diagonal_(0).max() < 0.2
        counts.add(len(placed))
        heights |= {item.alpha.shape[0] for item in placed}
        classes |= {item.digit for item in placed}
    assert counts == {1, 2, 3}
    # A rounded edge may fall short of being ink.
    assert set(range(14, 31)) <= heights <= set(range(13, 31))
    assert classes == set(range(10))


def test_boxes_are_tight_and_digits_stand_out():
    rng = np.random.default_rng(0)
    for number in range(60):
        _, placed = paint_scene(DIGITS, Scenes(), number)
        for item in placed:
            image = np.asarray(paint(rng, np.zeros((64, 64, 3)), [item])).astype(int)
            painted = [
                (x, y) for y in range(64) for x in range(64) if image[y, x].max() > 255 * 0.02
            ]
            x0, y0 = min(x for x, _ in painted), min(y for _, y in painted)
            x1, y1 = max(x for x, _ in painted) + 1, max(y for _, y in painted) + 1
            assert (x0, y0, x1 - x0, y1 - y0) == item.box
            assert image.max() > 75
