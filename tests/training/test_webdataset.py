"""Shards of the WebDataset format by timm's reader: each sample once, also in two processes."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from training.data.loaders import make_loader, set_epoch
from training.data.seeded import SeededStream
from training.data.sources import open_source

pytest.importorskip("webdataset")
LENGTHS = (5, 2, 4)  # do not divide between two processes


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of images that are their own number, for training and to hold out."""
    splits, number = {}, 0
    for split in ("train", "validation"):
        names = []
        for shard, length in enumerate(LENGTHS):
            names.append(f"{split}-{shard}.tar")
            with tarfile.open(tmp_path / names[-1], "w") as archive:
                for _ in range(length):
                    number += 1
                    image = io.BytesIO()
                    Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(image, "PNG")
                    for end, data in (("png", image.getvalue()), ("cls", str(number % 3).encode())):
                        entry = tarfile.TarInfo(f"{number:04}.{end}")
                        entry.size = len(data)
                        archive.addfile(entry, io.BytesIO(data))
        splits[split] = {
            "name": split,
            "filenames": names,
            "shard_lengths": LENGTHS,
            "num_samples": sum(LENGTHS),
        }
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    return tmp_path


def read(shards: Path, rank: int, world: int, workers: int, batch: int = 2) -> list[int]:
    """Numbers of the held-out images that a process reads."""
    source = open_source("wds/x", str(shards), "validation", training=False, batch_size=batch)
    source.reader.dist_rank, source.reader.dist_num_replicas = rank, world  # as a group has set
    stream = SeededStream(source, pil_to_tensor, 0, rank, world)
    loader = make_loader(stream, batch_size=batch, training=False, seed=0, workers=workers)
    set_epoch(loader, 0)
    found = []
    for parts in loader:
        numbers = parts.images[:, 0, 0, 0].tolist()
        assert parts.targets.tolist() == [number % 3 for number in numbers]
        found += numbers
    return found


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_held_out_sample_is_read_once(shards: Path, world: int, workers: int):
    parts = [read(shards, rank, world, workers) for rank in range(world)]
    total = sum(LENGTHS)
    assert sorted(number for part in parts for number in part) == [*range(total + 1, 2 * total + 1)]


def test_training_processes_take_as_many_steps(shards: Path):
    counts = []
    for rank in range(2):
        source = open_source("wds/x", str(shards), "train", training=True, batch_size=2)
        source.reader.dist_rank, source.reader.dist_num_replicas = rank, 2
        source.reader.set_loader_cfg(0)
        stream = SeededStream(source, lambda image: torch.zeros(1), 0, rank)
        loader = make_loader(stream, batch_size=2, training=True, seed=0)
        set_epoch(loader, 0)
        counts.append(sum(1 for _ in loader))
    assert counts == [3, 3]


def test_a_run(cls, shards: Path, tmp_path: Path):
    options = ["--data.name=wds/x", f"--data.root={shards}", "--model.in_chans=3"]
    options += ["--model.num_classes=3", "--batch_size=4", "--run.experiment=x", "--epochs=1"]
    status, _, err = cls(*options, "--eval_batch_size=4", "--run.device=cpu")
    assert status == 0, err
    lines = (tmp_path / "runs" / "x" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["count"] == sum(LENGTHS)
    status, _, err = cls(*options, "--aug.repeats=3")
    assert status == 2 and "aug.repeats: 3" in err
