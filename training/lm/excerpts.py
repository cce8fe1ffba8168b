"""The task of classifying excerpts of text by their package."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from training.cls.classify import Classify
from training.cls.options import AugConfig
from training.data.digest import Digest, array_digest
from training.data.seeded import BadImages, Sample
from training.errors import UserError
from training.lm.model import build_classifier, encoding_name
from training.lm.options import LmConfig
from training.seeding import derive
from training.task import loader_of
from training.text.corpus import SPLITS, Document, open_corpus
from training.weights import identity


@dataclass(frozen=True)
class Excerpts(Dataset):
    """M excerpts of one split.

    Attributes:
        bytes: [M, size] uint8.
        labels: [M] int64, indices of ``classes``.
        classes: names of the packages, the same for all splits.
        names: file and start of each excerpt in bytes, as ``json/decoder.py:512``.
    """

    bytes: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, ...]) -> Sample:
        """Return the excerpt of an (epoch, index, copy) of a sampler, as int64 [size]."""
        excerpt = torch.from_numpy(self.bytes[key[1]].astype(np.int64))
        return Sample(excerpt, int(self.labels[key[1]]))


def make_excerpts(
    splits: Mapping[str, Iterable[Document]],
    size: int,
    *,
    min_files: int = 8,
    per_class: int | None = None,
) -> dict[str, Excerpts]:
    """Cut the documents of each split into disjoint excerpts of ``size`` bytes.

    A package is a class if it has at least ``min_files`` files and an excerpt in every split. An
    excerpt that also occurs in an earlier split is left out, so that no test excerpt is trained on.
    The end of a file that is shorter than ``size`` is left out.

    Args:
        size: length of an excerpt in bytes.
        min_files: minimum number of files of a package.
        per_class: maximum number of excerpts of a class in each split; None: all.

    Raises:
        UserError: if fewer than two packages are left.
    """
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
    parts: dict[str, list[tuple[str, bytes]]], classes: tuple[str, ...], size: int, most: int | None
) -> Excerpts:
    entries, labels = [], []
    for label, package in enumerate(classes):
        kept = parts[package]
        chosen = set(sorted(kept, key=lambda entry: derive("excerpt", entry[0]))[:most])
        kept = [entry for entry in kept if entry in chosen]
        entries += kept
        labels += [label] * len(kept)
    names, rows = zip(*entries, strict=True)
    stacked = np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, size)
    return Excerpts(stacked, np.array(labels, dtype=np.int64), classes, names)


class ClassifyExcerpts(Classify):
    """Training and evaluation of a classifier of excerpts."""

    unit = "texts"

    def __init__(self, config: LmConfig, accelerator: Accelerator) -> None:
        # Use all splits, so that classes do not depend on the evaluated split.
        self.parts = make_excerpts(
            {split: open_corpus(config.data, split) for split in SPLITS},
            **vars(config.excerpts),
        )
        classes, spec = self.parts["train"].classes, encoding_name(config)
        loaders = [
            loader_of(config, accelerator, self.parts[split], training=training)
            for split, training in (("train", True), (config.split, False))
        ]
        super().__init__(
            AugConfig(smoothing=0.0),
            len(classes),
            (),
            loaders,
            BadImages("fail"),
            config,
            accelerator,
            build_classifier(config, classes),
            f"excerpts{config.excerpts.size}-{spec}-seed{config.seed}",
            {"model": "classifier", "encoding": spec, **identity(classes)},
        )

    def digest(self) -> Digest:
        return array_digest(**{k: [x.bytes, x.labels] for k, x in self.parts.items()})
