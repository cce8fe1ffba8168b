"""Data sets whose augmentation depends only on (seed, epoch, sample)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from training.errors import UserError, one_line
from training.seeding import derive, forked

# Exceptions of PIL for files that are truncated, mislabelled, too large or not images. Not
# MemoryError, which other causes have.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    Image.DecompressionBombError,
)


_TRIES = 50  # images to try in place of one that does not decode


@dataclass(frozen=True)
class BadImage:
    """An image that could not be decoded."""

    name: str
    reason: str


class BadImages:
    """Handles and records images that do not decode.

    Args:
        policy: "fail" raises :class:`UserError` at the first; "skip" records them.

    Attributes:
        say: a function that prints a line.
    """

    def __init__(self, policy: Literal["skip", "fail"]) -> None:
        self.policy, self.say = policy, print
        self.seen: dict[str, str] = {}

    def note(self, bad: Iterable[BadImage]) -> None:
        """Record the bad images of a batch, or raise."""
        for item in bad:
            if self.policy == "fail":
                raise UserError(
                    f"image {item.name!r} does not decode: {item.reason}; "
                    "data.on_bad_image: skip would leave it out"
                )
            if item.name not in self.seen:
                self.seen[item.name] = item.reason
                self.say(f"skipped, does not decode ({len(self.seen)}): {item.name}: {item.reason}")

    def gather(self) -> dict[str, str]:
        """Return the reasons by name of all processes' bad images."""
        merged: dict[str, str] = {}
        for part in gather_object([self.seen]):
            merged.update(part)
        return dict(sorted(merged.items()))


@dataclass
class Sample:
    """One sample of a batch: the image [C, H, W], its target, and skipped images."""

    image: Tensor | None
    target: Any
    bad: tuple[BadImage, ...] = ()


class SeededDataset(Dataset):
    """A source (see sources.py) with a transform, indexed by (epoch, sample, copy).

    The copy is optional. The index contains the epoch, so persistent loader processes need no
    message about the next epoch.

    Args:
        transform: a function of a PIL image.
        replace: for images that do not decode. True (training): use the next of 50 images that
            decodes, so that batches keep their size. False (evaluation): drop the sample.
    """

    def __init__(
        self, source: Any, transform: Callable[..., Any], seed: int, replace: bool
    ) -> None:
        self.source, self.transform, self.seed, self.replace = source, transform, seed, replace

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, ...]) -> Sample:
        epoch, first, *copy = key
        bad: list[BadImage] = []
        for step in range(min(len(self), _TRIES) if self.replace else 1):
            index = (first + step) % len(self)
            try:
                image, target = self.source.read(index)
            except DECODE_ERRORS as error:
                reason = one_line(error) or type(error).__name__
                bad.append(BadImage(self.source.name(index), reason))
                continue
            # The seed of the requested sample, also for a replacement.
            with forked(derive(self.seed, "augment", epoch, first, *filter(None, copy))):
                return Sample(*self.apply(image, target), tuple(bad))
        return Sample(None, -1, tuple(bad))

    def apply(self, image: Image.Image, target: Any) -> tuple[Tensor, Any]:
        """Return the transformed image, and its target unmodified."""
        return self.transform(image), target


class SeededStream(IterableDataset):
    """A streaming timm data set with a transform seeded by (seed, epoch, process, worker, count).

    timm distributes the samples to processes and workers. Samples have no numbers, so their order
    is only as reproducible as that of the data set.

    Args:
        transform: a function of a PIL image.
        rank: index of this process.
        world: number of processes in evaluation: each reads all samples and keeps its part, since
            timm would drop or repeat samples to make parts equal. 1: timm distributes samples.
    """

    def __init__(
        self,
        stream: Any,
        transform: Callable[[Any], Tensor],
        seed: int,
        rank: int,
        world: int = 1,
    ) -> None:
        self.stream, self.transform, self.seed, self.rank = stream, transform, seed, rank
        self.epoch, self.world = 0, world
        if world > 1:
            reader = stream.reader
            reader.dist_rank, reader.dist_num_replicas = 0, 1
            reader.global_num_workers = reader.num_workers

    def __len__(self) -> int:
        return len(self.stream)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        number = worker.id if worker else 0
        for count, (image, target) in enumerate(self.stream):
            if self.world > 1 and count % self.world != self.rank:
                continue
            with forked(derive(self.seed, "augment", self.epoch, self.rank, number, count)):
                transformed = self.transform(image)
            yield Sample(transformed, int(target))
