"""Fashion-MNIST as a data set: splits, places of its files, damaged files, options."""

import gzip

import numpy as np
import pytest
from PIL import Image

from training.data import fashion
from training.data.fashion import Fashion
from training.data.sources import data_digest, open_source
from training.errors import UserError

COUNTS = {"train": 60_000, "t10k": 10_000}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The four files, where image i of a part is filled with i % 251 and of class i % 10."""
    folder = tmp_path_factory.mktemp("fashion")
    for part, count in COUNTS.items():
        numbers = np.arange(count)
        pixels = np.repeat((numbers % 251).astype(np.uint8), 28 * 28)
        for kind, sizes, content in (
            ("images-idx3", (count, 28, 28), pixels),
            ("labels-idx1", (count,), (numbers % 10).astype(np.uint8)),
        ):
            header = bytes([0, 0, 8, len(sizes)]) + np.array(sizes, ">i4").tobytes()
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + content.tobytes())
    return folder


@pytest.mark.parametrize(
    ("split", "first", "count", "part"),
    [
        ("train", 0, 50_000, "train"),
        ("validation", 50_000, 10_000, "train"),
        ("train+validation", 0, 60_000, "train"),
        ("test", 0, 10_000, "t10k"),
    ],
)
def test_splits(files, split, first, count, part):
    source = open_source("fashion", str(files), split, training=False, in_chans=1)
    assert len(source) == count
    assert source.classes[9] == "boot"
    for index in (0, 1, count - 1):
        image, target = source.read(index)
        assert image.size == (28, 28)
        assert np.unique(image) == (first + index) % 251
        assert target == (first + index) % 10
        assert source.name(index).endswith(f"{part} image {first + index}")


def test_colour(files):
    image, _ = open_source("fashion", str(files), "test", training=False).read(3)
    assert image.mode == "RGB"


def test_digest_is_of_the_files(files):
    before = data_digest([Fashion("test", root=str(files))], str(files))
    assert len(before) == 4
    assert before == data_digest([Fashion("train", root=str(files))], None)


def test_torchvisions_folder(files, tmp_path):
    (tmp_path / "FashionMNIST").mkdir()
    (tmp_path / "FashionMNIST" / "raw").symlink_to(files)
    assert len(Fashion("test", root=str(tmp_path))) == 10_000


def test_same_as_torchvision(files, tmp_path):
    from torchvision.datasets import FashionMNIST

    (tmp_path / "FashionMNIST").mkdir()
    (tmp_path / "FashionMNIST" / "raw").symlink_to(files)
    ours, theirs = Fashion("test", root=str(tmp_path)), FashionMNIST(str(tmp_path), train=False)
    for index in (0, 77, 9_999):
        (image, target), (other, label) = ours.read(index), theirs[index]
        assert target == label
        assert np.array_equal(image, other)


def test_compressed(files, tmp_path):
    for path in files.iterdir():
        content = path.read_bytes()
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(content, 1))
    source = Fashion("test", "L", str(tmp_path))
    assert source.read(9_999)[1] == 9


def damage(folder, name, change):
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(change(content))


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("t10k-labels-idx1-ubyte", lambda x: x[:-1], "damaged"),
        ("t10k-labels-idx1-ubyte", lambda x: x + b"\0", "damaged"),
        ("t10k-labels-idx1-ubyte", lambda x: b"", "damaged"),
        ("t10k-images-idx3-ubyte", lambda x: x[:3] + b"\1" + x[4:], "damaged"),
        ("t10k-images-idx3-ubyte", lambda x: x[:7] + b"\0" + x[8:], "damaged"),
    ],
)
def test_damaged(files, tmp_path, name, change, said):
    for path in files.iterdir():
        if path.name == name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
        else:
            (tmp_path / path.name).symlink_to(path)
    damage(tmp_path, name, change)
    with pytest.raises(UserError, match=f"{name} is {said}"):
        Fashion("test", "L", str(tmp_path))


def test_damaged_archive(files, tmp_path):
    for path in files.iterdir():
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 0)[:-9])
    with pytest.raises(UserError, match="cannot read .*t10k-images-idx3-ubyte.gz"):
        Fashion("test", "L", str(tmp_path))


def test_missing(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=f"no train-images.* in {tmp_path} or .*raw"):
        Fashion("train", root=str(tmp_path))
    monkeypatch.setattr(fashion, "DEBIAN", tmp_path / "none")
    with pytest.raises(UserError, match="apt install dataset-fashion-mnist"):
        Fashion("train")
    with pytest.raises(UserError, match="no split 'val'; valid: train, validation"):
        Fashion("val", root=str(tmp_path))


def test_download(files, tmp_path, monkeypatch):
    """torchvision places the files; a failed download is one line."""
    calls = []

    def fetch(root, download):
        calls.append((root, download))
        raise RuntimeError("no network")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", fetch)
    with pytest.raises(UserError, match="the download into .* failed: no network"):
        Fashion("train", root=str(tmp_path), download=True)
    assert calls == [(str(tmp_path), True)]


def test_debians_files():
    """The real images, where the package is installed."""
    if not fashion.DEBIAN.exists():
        pytest.skip("apt install dataset-fashion-mnist")
    source = Fashion("train+validation")
    assert np.bincount(source.targets).tolist() == [6_000] * 10
    assert isinstance(source.read(0)[0], Image.Image)
    assert abs(source.pixels.mean() / 255 - 0.286) < 1e-3
    assert abs(source.pixels.std() / 255 - 0.353) < 1e-3
