"""Samplers and loaders in which every sample occurs exactly once.

Each of W processes reads every W-th sample of a common order. Loaders are not passed to
``accelerate.prepare``, which would shard them again.
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
    """The samples of one epoch and process, as (epoch, sample, copy).

    Args:
        shuffle: whether each epoch has a new order, from (seed, epoch); else ascending.
        even: whether each process gets the same number of samples, without the last few of the
            order (training). Otherwise every sample occurs in exactly one process.
        repeats: number of consecutive copies of each sample, augmented differently in several
            processes (repeated augmentation, Hoffer et al., 2020). The length of an epoch stays,
            with fewer samples.
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
        """Set the epoch, and ``first``, the index of its first sample, to 0."""
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
    """A list, indexed by the items of :class:`EpochSampler`."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, ...]) -> Any:
        return self.rows[key[1]]


def each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor in a dataclass, list or dict, and return the result."""
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
        """Return the batch on a device, copied asynchronously from pinned memory."""
        return each_tensor(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Any:
        """Return the batch in pinned memory; loaders call it."""
        return each_tensor(self, Tensor.pin_memory)


@dataclass
class Batch(Movable):
    """Images [B, C, H, W], their classes [B], and skipped images."""

    images: Tensor
    targets: Tensor
    bad: tuple[BadImage, ...] = ()


def collate(samples: list[Sample]) -> Batch:
    """Stack the images of samples; B is 0 if no sample has an image."""
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
    """Return a loader for one process; see :func:`set_epoch`.

    Args:
        training: whether to shuffle and drop the last incomplete batch.
        repeats: see :class:`EpochSampler`.
        collate: makes a batch of samples.

    Raises:
        UserError: if ``repeats`` is given for a stream.
    """
    streaming = isinstance(dataset, SeededStream)
    sampler = None
    if not streaming:
        sampler = EpochSampler(
            len(dataset), seed=seed, shuffle=training, even=training, rank=rank, world=world,
            repeats=repeats,
        )  # fmt: skip
    elif repeats > 1:
        raise UserError(f"aug.repeats: {repeats} is not supported for streams")
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
        # Workers of a stream read the epoch when they start.
        persistent_workers=workers > 0 and not streaming,
        # A separate generator, so that base seeds do not change the global one.
        generator=torch.Generator().manual_seed(derive(seed, "loader", rank)),
        worker_init_fn=_outlive_signals,
    )


def _outlive_signals(worker: int) -> None:
    """Ignore signals to all processes of a job, since the loop needs batches to finish its step.

    A minute after SIGTERM the process ends in any case.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *given: signal.alarm(60))


def set_epoch(loader: DataLoader, epoch: int) -> None:
    """Set the epoch of a loader's sampler or stream."""
    target = loader.sampler if isinstance(loader.sampler, EpochSampler) else loader.dataset
    target.set_epoch(epoch)


def batches_of(loader: DataLoader, epoch: int, skip: int = 0) -> Iterator[Any]:
    """Yield the batches of an epoch without the first ``skip``.

    A sampler skips samples without reading them; a stream reads and drops them.

    Raises:
        Interrupted: if a loader process was killed.
        UserError: from a loader process.
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
        # The error of a loader process is its traceback as text, with the message at the end.
        message = str(error)
        if " in DataLoader worker process " in message:
            message = message.strip().rpartition("\n")[2].partition(": ")[2]
        raise UserError(message) from error
    except RuntimeError as error:
        # Not the exceptions of a worker: "Caught ... in DataLoader worker process 0".
        died = re.search(r"DataLoader worker \(pid.*", one_line(error))
        if died is None:
            raise
        raise Interrupted(
            f"a process that loads data died ({died[0]:.160}), often because memory ran out: use "
            "fewer data.workers or a smaller batch_size, and --resume auto"
        ) from error
