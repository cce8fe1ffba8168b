"""What is a class and what is an image, in folders and in archives."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data.sources import open_source
from training.errors import UserError


def paint(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".txt", ".heic"):
            path.write_bytes(b"text")
        else:
            Image.fromarray(np.zeros((3, 4, 3), np.uint8)).save(path)


CASES = [
    # files below the split, classes, images of each, files left out
    (["cat/day/1.png", "cat/night/1.png", "dog/day/2.png"], ("cat", "dog"), [2, 1], []),
    (["cat/1.png", "dog/1.png", "cover.png"], ("cat", "dog"), [1, 1], ["cover.png"]),
    (["cat/1.png", "cat/.ipynb_checkpoints/1.png", ".thumbs/1.png"], ("cat",), [1], []),
    (["cat/1.webp", "cat/2.bmp", "cat/3.TIF", "dog/4.JPEG"], ("cat", "dog"), [3, 1], []),
    (
        ["cat/1.png", "cat/2.heic", "cat/a.txt", "dog/1.png"],
        ("cat", "dog"),
        [1, 1],
        ["cat/2.heic", "cat/a.txt"],
    ),
    (["10/1.png", "2/1.png", "2/.1.png"], ("2", "10"), [1, 1], []),
]


@pytest.mark.parametrize("kind", ["folder", "tar", "wrapped tar", "split tar"])
@pytest.mark.parametrize(("files", "classes", "counts", "left_out"), CASES)
def test_classes(tmp_path: Path, kind: str, files, classes, counts, left_out):
    paint(tmp_path / "train", *files)
    root = tmp_path
    if kind != "folder":
        if kind == "wrapped tar" and (len(classes) == 1 or "cover.png" in files):
            return  # what is around the classes cannot be told from a class
        root = tmp_path / "a.tar"
        with tarfile.open(root, "w") as file:
            names = {"tar": ".", "wrapped tar": "all", "split tar": "train"}
            file.add(tmp_path / "train", arcname=names[kind])
    source = open_source("folder", str(root), "train", training=True)
    assert source.classes == classes
    numbers = [source.read(index)[1] for index in range(len(source))]
    assert [numbers.count(number) for number in range(len(classes))] == counts
    assert all(source.read(index)[0].size == (4, 3) for index in range(len(source)))
    assert [Path(name).name for name in sorted(source.left_out)] == [
        Path(name).name for name in left_out
    ]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("cat\n\ndog\n", ["line 2", "blank"]),
        ("cat\n", ["lacks dog"]),
        ("cat\ndgo\n", ["lacks dog", "dgo"]),
        ("cat\ndog\ncat\n", ["'cat' twice"]),
        (None, ["is not a file"]),
    ],
)
@pytest.mark.parametrize("archive", [False, True])
def test_class_maps_that_do_not_fit(tmp_path: Path, text: str | None, parts, archive: bool):
    paint(tmp_path / "train", "cat/1.png", "dog/1.png")
    if text is not None:
        (tmp_path / "map.txt").write_text(text)
    root = tmp_path
    if archive:
        root = tmp_path / "a.tar"
        with tarfile.open(root, "w") as file:
            file.add(tmp_path / "train", arcname="train")
    given = {"training": True, "class_map": str(tmp_path / "map.txt")}
    with pytest.raises(UserError, match=r"data\.class_map") as caught:
        open_source("folder", str(root), "train", **given)
    assert [part for part in parts if part not in str(caught.value)] == []


def test_a_class_map_gives_the_numbers_and_nested_archives_are_classes(tmp_path: Path):
    paint(tmp_path / "train", "cat/1.png", "dog/1.png", "dog/deep/2.png")
    (tmp_path / "map.txt").write_text("dog\r\nemu\ncat\n")
    source = open_source(
        "folder", str(tmp_path), "train", training=True, class_map=str(tmp_path / "map.txt")
    )
    assert source.classes == ("dog", "emu", "cat")
    assert [source.read(index)[1] for index in range(3)] == [2, 0, 0]
    for name in ("cat", "dog"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as file:
            file.add(tmp_path / "train" / name, arcname="x")
    with tarfile.open(tmp_path / "all.tar", "w") as file:
        for name in ("cat", "dog"):
            file.add(tmp_path / f"{name}.tar", arcname=f"{name}.tar")
    source = open_source("folder", str(tmp_path / "all.tar"), "train", training=True)
    assert source.classes == ("cat", "dog")
    assert [source.read(index)[1] for index in range(3)] == [0, 1, 1]


def test_an_archive_without_splits_is_not_trained_and_evaluated_on(cls, tmp_path: Path):
    paint(tmp_path / "train", "cat/1.png", "dog/1.png")
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        file.add(tmp_path / "train", arcname=".")
    status, _, err = cls(
        "--data.name=folder", f"--data.root={tmp_path / 'a.tar'}", "--model.in_chans=3"
    )
    assert status == 2 and "the same images for training and evaluation" in err
