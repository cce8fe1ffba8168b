"""Classification of text: which package is this excerpt from?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.data.loaders import EpochSampler
from training.errors import UserError
from training.seeding import derive
from training.text.corpus import Document


@dataclass(frozen=True)
class Excerpts:
    """M excerpts of one split.

    Attributes:
        bytes: [M, size] uint8.
        labels: [M] int64, numbers of ``classes``.
        classes: names of the packages, the same for all splits.
        names: file and first byte of each excerpt, as ``json/decoder.py:512``.
    """

    bytes: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self,
        batch_size: int,
        *,
        training: bool,
        seed: int = 0,
        epoch: int = 0,
        shard: int = 0,
        shards: int = 1,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield bytes [B, size] int64 and labels [B] of an epoch, for one of ``shards`` processes.

        Training shuffles by (seed, epoch) and leaves out the last incomplete batch; evaluation
        does neither, and every excerpt occurs in one process.
        """
        sampler = EpochSampler(
            len(self), seed=seed, shuffle=training, even=training, rank=shard, world=shards
        )
        sampler.set_epoch(epoch)
        order = np.array([index for _, index, _ in sampler], dtype=np.int64)
        end = len(order) - len(order) % batch_size if training else len(order)
        for start in range(0, end, batch_size):
            chosen = order[start : min(start + batch_size, end)]
            inputs = torch.from_numpy(self.bytes[chosen].astype(np.int64))
            yield inputs, torch.from_numpy(self.labels[chosen])


def make_excerpts(
    splits: Mapping[str, Iterable[Document]],
    size: int,
    *,
    min_files: int = 8,
    per_class: int | None = None,
) -> dict[str, Excerpts]:
    """Cut the documents of each split into disjoint excerpts of ``size`` bytes.

    A package is a class if it has at least ``min_files`` files in all, and an excerpt in every
    split. Splits are taken in their order: an excerpt that is, byte for byte, one of an earlier
    split is left out, so that none is both learned and asked for. What a file has beyond a multiple
    of ``size`` is left out too.

    Args:
        per_class: keep at most so many excerpts of a class in each split, chosen by their names.

    Raises :class:`UserError` unless at least two packages are left.
    """
    if size < 1:
        raise UserError(f"size: an excerpt of {size} bytes is not possible; 512 would work")
    files: dict[str, int] = {}
    found: dict[str, dict[str, list[tuple[str, bytes]]]] = {}
    earlier: set[bytes] = set()
    for split, documents in splits.items():
        found[split], seen = {}, set()
        for document in documents:
            files[document.package] = files.get(document.package, 0) + 1
            content = document.text.encode("utf-8")
            for start in range(0, len(content) - size + 1, size):
                excerpt = content[start : start + size]
                if excerpt not in earlier:
                    entry = f"{document.name}:{start}", excerpt
                    found[split].setdefault(document.package, []).append(entry)
                    seen.add(excerpt)
        earlier |= seen
    classes = tuple(
        package
        for package in sorted(files)
        if files[package] >= min_files and all(package in parts for parts in found.values())
    )
    if len(classes) < 2:
        raise UserError(
            f"{len(classes)} of {len(files)} packages have {min_files} files, and an excerpt of "
            f"{size} bytes in each of {', '.join(splits)}; at least two are needed: give more "
            "text, shorter excerpts or a smaller min_files"
        )
    return {split: _collect(parts, classes, size, per_class) for split, parts in found.items()}


def _collect(
    parts: dict[str, list[tuple[str, bytes]]],
    classes: tuple[str, ...],
    size: int,
    per_class: int | None,
) -> Excerpts:
    names, rows, labels = [], [], []
    for label, package in enumerate(classes):
        kept = parts[package]
        if per_class is not None and len(kept) > per_class:
            chosen = set(sorted(kept, key=lambda entry: derive("excerpt", entry[0]))[:per_class])
            kept = [entry for entry in kept if entry in chosen]
        names += [name for name, _ in kept]
        rows += [excerpt for _, excerpt in kept]
        labels += [label] * len(kept)
    stacked = np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, size)
    return Excerpts(stacked, np.array(labels, dtype=np.int64), classes, tuple(names))
