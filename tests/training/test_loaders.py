"""Sources, seeded augmentation and loaders."""

import functools
import operator
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from common import refuses
from PIL import Image
from timm.data import IterableImageDataset
from torchvision import transforms as tv

from training.data.digits import Digits
from training.data.loaders import EpochSampler, make_loader, set_epoch
from training.data.seeded import SeededDataset, SeededStream
from training.data.sources import open_source
from training.errors import UserError
from training.seeding import derive, forked


class Numbers:
    """A source whose image is its number: bright pixels say which sample arrived."""

    classes = None

    def __init__(self, length: int, broken: frozenset[int] = frozenset()) -> None:
        self.length, self.broken = length, broken

    def __len__(self) -> int:
        return self.length

    def read(self, index: int):
        if index in self.broken:
            raise OSError("cannot identify image")
        return Image.fromarray(np.full((4, 4), index, dtype=np.uint8)), index

    def name(self, index: int) -> str:
        return f"number {index}"


def noisy(image) -> torch.Tensor:
    """A transform that draws from all three generators."""
    value = random.random() + np.random.rand() + torch.rand(()).item()
    return tv.functional.to_tensor(image) + value


def collect(loader, epoch: int = 0) -> tuple[list[int], dict[int, torch.Tensor]]:
    set_epoch(loader, epoch)
    order, images = [], {}
    for batch in loader:
        order += batch.targets.tolist()
        images.update(zip(batch.targets.tolist(), batch.images, strict=True))
    return order, images


def loader_of(source, transform=noisy, *, seed=3, training=False, batch_size=5, **options):
    dataset = SeededDataset(source, transform, seed, replace=training)
    return make_loader(dataset, batch_size=batch_size, training=training, seed=seed, **options)


# --- digits -------------------------------------------------------------------------------------


def test_digits_split_is_fixed_disjoint_and_stratified():
    train, held_out = Digits("train"), Digits("validation")
    assert (len(train), len(held_out)) == (1437, 360)
    assert set(train.indices) | set(held_out.indices) == set(range(1797))
    counts = np.bincount([held_out.read(index)[1] for index in range(360)])
    assert counts.min() >= 34
    assert counts.max() <= 37
    # The split belongs to the data set and must never move: these are its first held-out scans.
    assert held_out.indices[:6].tolist() == FIRST_HELD_OUT


FIRST_HELD_OUT = [21, 24, 28, 34, 35, 37]


# --- every sample once ---------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("length", [0, 1, 7, 24])
def test_evaluation_gives_every_sample_to_exactly_one_process(length: int, world: int):
    options = {"seed": 0, "shuffle": False, "even": False, "world": world}
    parts = [list(EpochSampler(length, rank=rank, **options)) for rank in range(world)]
    assert sorted(index for part in parts for _, index, _ in part) == list(range(length))
    assert [len(part) for part in parts] == [
        len(EpochSampler(length, rank=rank, **options)) for rank in range(world)
    ]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_processes_share_one_shuffled_order_evenly(world: int):
    def parts(epoch: int, seed: int = 5) -> list[list[int]]:
        found = []
        for rank in range(world):
            sampler = EpochSampler(23, seed=seed, shuffle=True, even=True, rank=rank, world=world)
            sampler.set_epoch(epoch)
            found.append([index for _, index, _ in sampler])
        return found

    first = parts(0)
    flat = functools.reduce(operator.iadd, first, [])
    assert len(set(flat)) == len(flat) == 23 // world * world
    assert first == parts(0)
    assert first != parts(1)
    assert first != parts(0, seed=6)
    # Step k of W processes holds the samples that step k of one process with W times the batch has.
    alone = EpochSampler(23, seed=5, shuffle=True, even=True)
    whole = [index for _, index, _ in alone]
    assert [part[0] for part in first] == whole[:world]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_loader_evaluates_every_sample_once_in_order(workers: int):
    order, _ = collect(loader_of(Numbers(13), workers=workers))
    assert order == list(range(13))


@pytest.mark.parametrize("repeats", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 7, 24, 25])
def test_repeated_augmentation(length: int, world: int, repeats: int):
    """Walk through the shuffled order; each image is dealt out so often before the next one is."""
    options = {"seed": 5, "shuffle": True, "even": True, "world": world}
    order = [index for _, index, _ in EpochSampler(length, seed=5, shuffle=True, even=True)]
    each = length // world
    hands: list[list[tuple[int, int, int]]] = [[] for _ in range(world)]
    dealt = 0
    for index in order:
        for copy in range(repeats):
            if dealt < each * world:
                hands[dealt % world].append((0, index, copy))
            dealt += 1
    found = [EpochSampler(length, rank=rank, repeats=repeats, **options) for rank in range(world)]
    assert [list(sampler) for sampler in found] == hands
    assert [len(sampler) for sampler in found] == [each] * world
    for sampler, hand in zip(found, hands, strict=True):
        sampler.first = 2  # as a resumed run
        assert list(sampler) == hand[2:]


def test_repeated_images_are_those_of_timm():
    """timm draws another order, but deals out any order like this."""
    from timm.data.distributed_sampler import RepeatAugSampler

    for rank in range(2):
        theirs = RepeatAugSampler(
            range(24), 2, rank, shuffle=False, num_repeats=3, selected_round=0
        )
        options = {"seed": 0, "shuffle": False, "even": True, "rank": rank, "world": 2}
        ours = EpochSampler(24, repeats=3, **options)
        assert [index for _, index, _ in ours] == list(theirs)


def test_copies_of_an_image_are_augmented_otherwise():
    dataset = SeededDataset(Numbers(5), noisy, 3, replace=False)
    first, again = dataset[0, 2, 0].image, dataset[0, 2, 1].image
    assert not torch.equal(first, again)
    assert torch.equal(first, dataset[0, 2].image)  # as without repeats
    assert torch.equal(again, dataset[0, 2, 1].image)


# --- augmentation --------------------------------------------------------------------------------


def test_augmentation_depends_on_seed_epoch_and_sample_only():
    base = collect(loader_of(Numbers(12), workers=0), epoch=4)[1]
    for options in (
        {"workers": 2},
        {"workers": 1, "batch_size": 3},
        {"training": True, "batch_size": 4},
    ):
        order, images = collect(loader_of(Numbers(12), **options), epoch=4)
        assert sorted(order) == list(range(12))
        assert all(torch.equal(images[index], base[index]) for index in base), options
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    again = collect(loader_of(Numbers(12)), epoch=4)[1]
    assert all(torch.equal(again[index], base[index]) for index in base)


def test_augmentation_differs_between_seeds_epochs_and_samples():
    def noise(**options) -> torch.Tensor:
        epoch = options.pop("epoch", 0)
        images = collect(loader_of(Numbers(12), **options), epoch=epoch)[1]
        return torch.stack([images[index].mean() - index / 255 for index in range(12)])

    base = noise()
    assert base.unique().numel() == 12
    assert (noise(epoch=1) != base).all()
    assert (noise(seed=4) != base).all()


def test_workers_that_live_on_follow_the_epoch():
    loader = loader_of(Numbers(12), workers=1)
    first, second = collect(loader, 0)[1], collect(loader, 1)[1]
    again = collect(loader, 0)[1]
    assert all(torch.equal(first[index], again[index]) for index in first)
    assert not any(torch.equal(first[index], second[index]) for index in first)


def test_forked_restores_all_generators():
    state = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    with forked(1):
        inside = random.random(), np.random.rand(), torch.rand(()).item()
    with forked(1):
        assert inside == (random.random(), np.random.rand(), torch.rand(()).item())
    assert state[0] == random.getstate()
    assert (state[1] == np.random.get_state()[1]).all()
    assert torch.equal(state[2], torch.get_rng_state())


def test_derive_separates_its_coordinates():
    seeds = {derive(a, "x", b) for a in range(30) for b in range(30)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive(1, 23) != derive(12, 3)


# --- images that do not decode -------------------------------------------------------------------


def test_bad_images_are_dropped_in_evaluation_and_named():
    batches = list(loader_of(Numbers(6, frozenset({1, 4})), batch_size=2))
    assert [batch.targets.tolist() for batch in batches] == [[0], [2, 3], [5]]
    assert [item.name for batch in batches for item in batch.bad] == ["number 1", "number 4"]
    assert "cannot identify" in batches[0].bad[0].reason
    empty = list(loader_of(Numbers(2, frozenset({0, 1}))))
    assert len(empty[0].targets) == 0
    assert len(empty[0].bad) == 2


def test_bad_images_are_replaced_in_training_and_named():
    loader = loader_of(Numbers(6, frozenset({1, 4, 5})), training=True, batch_size=3)
    order, _ = collect(loader)
    assert sorted(order) == [0, 0, 0, 2, 2, 3]
    assert {item.name for batch in loader for item in batch.bad} == {
        "number 1",
        "number 4",
        "number 5",
    }


def test_errors_of_the_program_are_not_taken_for_bad_images():
    def broken(image):
        raise OSError("not the file's fault")

    with pytest.raises(OSError, match="not the file"):
        list(loader_of(Numbers(3), transform=broken))


# --- data sets of timm ---------------------------------------------------------------------------


def test_image_folder(folder: Path):
    source = open_source("folder", str(folder), "train", training=True)
    assert len(source) == 12
    assert source.classes == ("ant", "bee")
    image, target = source.read(7)
    assert image.size == (9, 12)
    assert image.mode == "RGB"
    assert target == 1
    assert source.name(7) == str(folder / "train" / "bee" / "1.png")
    grey = open_source("folder", str(folder), "validation", training=False, in_chans=1)
    assert len(grey) == 10
    assert grey.read(0)[0].mode == "L"


def test_tar_archive(folder: Path, tmp_path: Path):
    import tarfile

    archive = tmp_path / "train.tar"
    with tarfile.open(archive, "w") as file:
        file.add(folder / "train", arcname="train")
    source = open_source("folder", str(archive), "train", training=True)
    assert len(source) == 12
    assert source.classes == ("ant", "bee")
    assert source.read(0)[0].size == (9, 12)


def test_streams_are_seeded_and_complete():
    class Reader:
        """Deals numbers out to workers, as timm's streaming readers do."""

        def __len__(self) -> int:
            return 12

        def __iter__(self):
            worker = torch.utils.data.get_worker_info()
            start, step = (worker.id, worker.num_workers) if worker else (0, 1)
            for index in range(start, 12, step):
                yield Image.fromarray(np.full((4, 4), index, dtype=np.uint8)), index

    def images(epoch: int, workers: int) -> tuple[list[int], dict[int, torch.Tensor]]:
        stream = SeededStream(IterableImageDataset("", reader=Reader()), noisy, seed=3, rank=0)
        loader = make_loader(stream, batch_size=4, training=False, seed=3, workers=workers)
        return collect(loader, epoch)

    order, first = images(0, 2)
    assert sorted(order) == list(range(12))
    again, other = images(0, 2)[1], images(1, 2)[1]
    assert all(torch.equal(first[index], again[index]) for index in first)
    assert not any(torch.equal(first[index], other[index]) for index in first)


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_bad_roots(folder: Path, tmp_path: Path):
    (folder / "train" / "cow").mkdir()
    write(folder / "notes" / "train" / "readme.txt", b"no image")
    write(tmp_path / "bad.tar", b"this is no archive")
    cases = [
        (("folder", None), ["data.root is not set"]),
        (("folder", str(tmp_path / "none")), ["does not exist", "none"]),
        (("folder", str(tmp_path)), ["no folder for the split 'train'"]),
        (("folder", str(folder)), ["class folder without images", str(folder / "train" / "cow")]),
        (("folder", str(folder / "notes")), ["no images in"]),
        (("folder", str(tmp_path / "bad.tar")), ["cannot open", "bad.tar"]),
        (("digitz", str(folder)), ["'digitz'", "valid: digits, fashion, folder"]),
        (("torch/cifarr", str(folder)), ["cannot open", "cifarr"]),
        (("torch/cifar10", str(folder)), ["cannot open", "cifar10"]),
    ]
    for (name, root), parts in cases:
        refuses(partial(open_source, name, root, "train", training=True), *parts, error=UserError)
