"""Samplers and loaders that give every sample its turn exactly once.

Processes share an epoch by taking every W-th sample of one common order. Loaders are not handed to
``accelerate.prepare``: it would shard again what timm's samplers and streams have sharded.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from training.data.seeded import BadImage, Sample, SeededDataset, SeededStream
from training.errors import UserError
from training.seeding import derive


class EpochSampler(Sampler):
    """Numbers of one epoch's samples for one process, as (epoch, sample, copy).

    Args:
        length: samples in the data set.
        shuffle: a new order each epoch, from (seed, epoch); else ascending.
        even: give each process equally many, leaving out the last few of the order (training: a
            process with fewer steps would leave the others waiting). Otherwise every sample occurs
            in exactly one process.
        repeats: how often each sample of the order stands in it, one after the other (repeated
            augmentation, Hoffer et al., 2020): so that several processes have it at once, each
            time augmented otherwise. An epoch is as long as without, over fewer samples.
    """

    def __init__(
        self,
        length: int,
        *,
        seed: int,
        shuffle: bool,
        even: bool,
        rank: int = 0,
        world: int = 1,
        repeats: int = 1,
    ) -> None:
        self.length, self.seed, self.shuffle, self.repeats = length, seed, shuffle, repeats
        self.even, self.rank, self.world = even, rank, world
        self.epoch = self.first = 0

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Choose the epoch, and which of this process's samples to begin it with."""
        self.epoch, self.first = epoch, first

    def __len__(self) -> int:
        if self.even:
            return self.length // self.world
        return len(range(self.rank, self.length, self.world))

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive(self.seed, "order", self.epoch))
            order = torch.randperm(self.length, generator=generator).tolist()
        else:
            order = list(range(self.length))
        copies = [(index, copy) for index in order for copy in range(self.repeats)]
        mine = copies[self.rank : self.length : self.world][: len(self)]
        return iter([(self.epoch, index, copy) for index, copy in mine[self.first :]])


@dataclass
class Batch:
    """Images [B, C, H, W], their classes [B], and the images that were skipped for them."""

    images: Tensor
    targets: Tensor
    bad: tuple[BadImage, ...] = ()


def collate(samples: list[Sample]) -> Batch:
    """Stack the samples that have an image; B may be 0 where none of them has."""
    bad = tuple(item for sample in samples for item in sample.bad)
    good = [sample for sample in samples if sample.image is not None]
    images = torch.stack([sample.image for sample in good]) if good else torch.empty(0)  # type: ignore[misc]
    return Batch(images, torch.tensor([sample.target for sample in good]), bad)


def make_loader(
    dataset: SeededDataset | SeededStream,
    *,
    batch_size: int,
    training: bool,
    seed: int,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
    repeats: int = 1,
    collate: Callable[[list[Sample]], Any] = collate,
) -> DataLoader:
    """Return a loader of what ``collate`` makes, for one process; see :func:`set_epoch`.

    Training shuffles and leaves out the last incomplete batch; evaluation does neither. For
    ``repeats``, see :class:`EpochSampler`.
    """
    streaming = isinstance(dataset, SeededStream)
    sampler = None
    if isinstance(dataset, SeededDataset):
        sampler = EpochSampler(
            len(dataset), seed=seed, shuffle=training, even=training, rank=rank, world=world,
            repeats=repeats,
        )  # fmt: skip
    elif repeats > 1:
        raise UserError(f"aug.repeats: {repeats} needs samples with numbers, and a stream has none")
    elif hasattr(dataset.stream, "set_loader_cfg"):
        dataset.stream.set_loader_cfg(num_workers=workers)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        drop_last=training,
        pin_memory=pin_memory,
        # A stream learns its epoch when its workers start.
        persistent_workers=workers > 0 and not streaming,
        # Of its own, so that drawing base seeds does not disturb the model's generator.
        generator=torch.Generator().manual_seed(derive(seed, "loader", rank)),
        worker_init_fn=_outlive_signals,
    )


def _outlive_signals(worker: int) -> None:
    """Leave the answer to a signal that all processes of a job get to the loop.

    It needs batches to end its step. A minute later the process ends in any case.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *given: signal.alarm(60))


def set_epoch(loader: DataLoader, epoch: int) -> None:
    """Tell a loader's sampler, or its stream, which epoch comes next."""
    target = loader.sampler if isinstance(loader.sampler, EpochSampler) else loader.dataset
    target.set_epoch(epoch)  # type: ignore[union-attr]


def batches_of(loader: DataLoader, epoch: int, skip: int = 0) -> Iterable[Any]:
    """Return the batches of an epoch without the first ``skip``.

    Samples that have numbers are skipped unread; a stream must be read up to there.
    """
    if isinstance(loader.sampler, EpochSampler):
        loader.sampler.set_epoch(epoch, skip * (loader.batch_size or 1))
        return loader
    set_epoch(loader, epoch)
    return itertools.islice(loader, skip, None)
