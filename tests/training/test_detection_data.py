"""Detection batches: padding, seeds, processes and images that do not decode."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_files import box, entry, instances, write_set, zip_folder

from training.data.coco import open_coco
from training.data.detection import (
    DetectionBatch,
    DetectionDataset,
    collate_detection,
    make_transform,
)
from training.data.loaders import make_loader, set_epoch
from training.data.seeded import BadImage, Sample
from training.det.options import DetAugConfig

TRAINING = make_transform(
    DetAugConfig(scales=[12, 16, 20], max_size=32, crop_scales=[16, 20], crop_size=(9, 14)),
    training=True,
)


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> tuple[str, str]:
    """Thirteen images of different sizes, each with as many boxes as its number modulo four."""
    rng = np.random.default_rng(0)
    data = instances()
    sizes = rng.integers(12, 30, (13, 2)).tolist()
    data["images"] = [entry(number, *size) for number, size in enumerate(sizes)]
    data["annotations"] = [
        box(0, number, (*rng.uniform(0, 6, 2).tolist(), *rng.uniform(2, 6, 2).tolist()))
        for number in range(13)
        for _ in range(number % 4)
    ]
    return write_set(tmp_path_factory.mktemp("coco"), data)


def loader_of(source, transform=TRAINING, *, training=False, batch_size=4, seed=3, **options):
    return make_loader(
        DetectionDataset(source, transform, seed, replace=training),
        batch_size=batch_size,
        training=training,
        seed=seed,
        collate=collate_detection,
        **options,
    )


def collect(loader, epoch: int = 0) -> dict[int, tuple[torch.Tensor, dict]]:
    """Images, padding cut off, and targets by image id; each must occur once."""
    set_epoch(loader, epoch)
    found: dict[int, tuple[torch.Tensor, dict]] = {}
    for batch in loader:
        for image, mask, target in zip(batch.images, batch.mask, batch.targets, strict=True):
            height, width = (int((~mask).any(axis).sum()) for axis in (1, 0))
            assert target["image_id"] not in found
            found[target["image_id"]] = (image[:, :height, :width], target)
    return found


def same(one: dict, other: dict) -> bool:
    return all(
        torch.equal(one[key][0], other[key][0])
        and torch.equal(one[key][1]["boxes"], other[key][1]["boxes"])
        and torch.equal(one[key][1]["labels"], other[key][1]["labels"])
        for key in one
    )


# --- batches -------------------------------------------------------------------------------------


def sample(height: int, width: int, **target) -> Sample:
    return Sample(torch.randn(3, height, width), target)


def test_images_are_padded_right_and_below():
    samples = [sample(4, 7, image_id=1), sample(6, 5, image_id=2), sample(6, 7, image_id=3)]
    batch = collate_detection(samples)
    assert batch.images.shape == (3, 3, 6, 7)
    assert batch.mask.dtype == torch.bool
    for number, one in enumerate(samples):
        for row in range(6):
            for column in range(7):
                _, height, width = one.image.shape
                inside = row < height and column < width
                assert batch.mask[number, row, column] == (not inside)
                expected = one.image[:, row, column] if inside else torch.zeros(3)
                assert torch.equal(batch.images[number, :, row, column], expected)
    assert [target["image_id"] for target in batch.targets] == [1, 2, 3]


def test_samples_without_an_image_leave_their_note():
    bad = BadImage("a.png", "broken"), BadImage("b.png", "broken too")
    batch = collate_detection([Sample(None, -1, bad[:1]), sample(2, 3), Sample(None, -1, bad[1:])])
    assert (batch.images.shape, len(batch.targets), batch.bad) == ((1, 3, 2, 3), 1, bad)
    empty = collate_detection([Sample(None, -1, bad)])
    assert (empty.images.shape, empty.mask.shape) == ((0, 3, 0, 0), (0, 0, 0))
    assert (empty.targets, empty.bad) == ([], bad)


def test_batch_moves_whole(monkeypatch):
    target = {"labels": torch.tensor([1]), "boxes": torch.ones(1, 4), "image_id": 5, "size": (2, 3)}
    batch = collate_detection([Sample(torch.ones(3, 2, 3), target, (BadImage("a", "b"),))])
    moved = batch.to("meta")
    tensors = [moved.images, moved.mask, moved.targets[0]["labels"], moved.targets[0]["boxes"]]
    assert all(tensor.is_meta for tensor in tensors)
    assert (moved.targets[0]["image_id"], moved.targets[0]["size"]) == (5, (2, 3))
    assert moved.bad == batch.bad
    assert not batch.images.is_meta
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    assert isinstance(torch.utils.data._utils.pin_memory.pin_memory(batch), DetectionBatch)
    assert len(pinned) == 4


# --- every image once ----------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_gives_every_image_to_exactly_one_process(paths, world: int):
    source = open_coco(*paths)
    transform = make_transform(DetAugConfig(eval_size=16, max_size=24), training=False)
    found: list[int] = []
    for rank in range(world):
        found += collect(loader_of(source, transform, rank=rank, world=world))
    assert sorted(found) == source.image_ids


# --- augmentation --------------------------------------------------------------------------------


def test_augmentation_depends_on_seed_epoch_and_sample_only(paths, tmp_path: Path):
    source = open_coco(*paths)
    base = collect(loader_of(source), epoch=4)
    archive = open_coco(zip_folder(paths[0], tmp_path / "images.zip"), paths[1])
    archive.read(0)
    cases = [
        (source, {"workers": 2}),
        (archive, {"workers": 2, "batch_size": 3}),
        (pickle.loads(pickle.dumps(source)), {}),
        (source, {"training": True, "batch_size": 13}),
    ]
    for images, options in cases:
        torch.manual_seed(len(options))
        found = collect(loader_of(images, **options), epoch=4)
        assert sorted(found) == list(range(13))
        assert same(base, found), options
    for other in (collect(loader_of(source), epoch=5), collect(loader_of(source, seed=4), epoch=4)):
        different = [not torch.equal(base[key][0], other[key][0]) for key in base]
        assert sum(different) > 10


def test_dataset_and_transform_can_be_pickled(paths):
    dataset = DetectionDataset(open_coco(*paths), TRAINING, 3, replace=True)
    other = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(dataset[1, 5].image, other[1, 5].image)


# --- images that do not decode -------------------------------------------------------------------


def broken_source(tmp_path: Path):
    folder, file = write_set(tmp_path)
    Path(folder, "20.png").write_bytes(b"no image")
    return open_coco(folder, file)


def test_bad_images_are_dropped_in_evaluation_and_named(tmp_path: Path):
    source = broken_source(tmp_path)
    batches = list(
        loader_of(source, make_transform(DetAugConfig(eval_size=16), training=False), batch_size=3)
    )
    assert [target["image_id"] for batch in batches for target in batch.targets] == [10, 30]
    (bad,) = batches[0].bad
    assert bad.name == source.name(1)
    assert "cannot identify" in bad.reason


def test_bad_images_are_replaced_in_training_and_named(tmp_path: Path):
    (batch,) = loader_of(broken_source(tmp_path), training=True, batch_size=3)
    assert sorted(target["image_id"] for target in batch.targets) == [10, 30, 30]
    assert len(batch.images) == 3
    assert [Path(item.name).name for item in batch.bad] == ["20.png"]
