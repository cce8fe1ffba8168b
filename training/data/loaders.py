"""Samplers and loaders in which every sample occurs exactly once.

Processes share an epoch by taking every W-th sample of one common order. Loaders are not handed to
``accelerate.prepare``: it would shard again what timm's samplers and streams have sharded.
"""

from __future__ import annotations

import itertools
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from irpe import IrpeError
from training.data.seeded import BadImage, Sample, SeededStream
from training.errors import Interrupted, UserError, one_line
from training.seeding import derive


@dataclass(kw_only=True, eq=False)
class EpochSampler(Sampler):
    """Numbers of one epoch's samples for one process, as (epoch, sample, copy).

    Args:
        length: samples in the data set.
        shuffle: a new order each epoch, from (seed, epoch); else ascending.
        even: give each process equally many, leaving out the last few of the order (training, as
            the others would wait for a process with more steps). Otherwise every sample occurs in
            exactly one process.
        repeats: copies of each sample of the order, one after the other (repeated
            augmentation, Hoffer et al., 2020): several processes have it at once, each
            augmented differently. An epoch is as long as without, over fewer samples.
    """

    length: int = field(kw_only=False)
    seed: int
    shuffle: bool
    even: bool
    rank: int = 0
    world: int = 1
    repeats: int = 1
    epoch = first = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, and to begin it with the first sample; ``first`` may be raised."""
        self.epoch, self.first = epoch, 0

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


class Rows(Dataset):
    """A list, indexed by what :class:`EpochSampler` yields."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, ...]) -> Any:
        return self.rows[key[1]]


def each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a dataclass, list or dict with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value):
        return replace(value, **each_tensor(vars(value), change))
    if isinstance(value, list):
        return [each_tensor(part, change) for part in value]
    if isinstance(value, dict):
        return {key: each_tensor(part, change) for key, part in value.items()}
    return value


class Movable:
    """A batch that can be pinned and copied to a device."""

    def to(self, device: torch.device | str) -> Any:
        """Return the batch on a device, without waiting for copies from pinned memory."""
        return each_tensor(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Any:
        """Return the batch in pinned memory; loaders call it."""
        return each_tensor(self, Tensor.pin_memory)


@dataclass
class Batch(Movable):
    """Images [B, C, H, W], their classes [B], and the images that were skipped for them."""

    images: Tensor
    targets: Tensor
    bad: tuple[BadImage, ...] = ()


def collate(samples: list[Sample]) -> Batch:
    """Stack the samples that have an image; B may be 0 where none of them has."""
    bad = tuple(item for sample in samples for item in sample.bad)
    good = [sample for sample in samples if sample.image is not None]
    images = torch.stack([sample.image for sample in good]) if good else torch.empty(0)
    return Batch(images, torch.tensor([sample.target for sample in good]), bad)


def make_loader(
    dataset: Dataset,
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
    if not streaming:
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
    """Ignore signals that all processes of a job receive, as the loop handles them.

    The loop needs batches to finish its step. After a minute the process ends in any case.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *given: signal.alarm(60))


def set_epoch(loader: DataLoader, epoch: int) -> None:
    """Tell a loader's sampler, or its stream, which epoch comes next."""
    target = loader.sampler if isinstance(loader.sampler, EpochSampler) else loader.dataset
    target.set_epoch(epoch)


def batches_of(loader: DataLoader, epoch: int, skip: int = 0) -> Iterator[Any]:
    """Yield the batches of an epoch without the first ``skip``.

    Samples that have numbers are skipped unread; a stream must be read up to there.

    Raises:
        Interrupted: where a loader process was killed. Its exceptions are raised as themselves.
    """
    batches: Iterable[Any] = loader
    set_epoch(loader, epoch)
    if isinstance(loader.sampler, EpochSampler):
        loader.sampler.first = skip * loader.batch_size
    else:
        batches = itertools.islice(loader, skip, None)
    try:
        yield from batches
    except (UserError, IrpeError) as error:
        # A loader process sends its traceback as text, with the message at the end.
        message = str(error)
        if " in DataLoader worker process " in message:
            message = message.strip().rpartition("\n")[2].partition(": ")[2]
        raise UserError(message) from error
    except RuntimeError as error:
        # Not the exceptions of a process: "Caught ... in DataLoader worker process 0".
        died = re.search(r"DataLoader worker \(pid.*", one_line(error))
        if died is None:
            raise
        raise Interrupted(
            f"a process that loads data died ({died[0]:.160}); often memory ran out: fewer "
            "data.workers or a smaller batch_size may help; then use --resume auto"
        ) from error
