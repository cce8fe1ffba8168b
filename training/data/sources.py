"""Where images come from: the embedded digits or anything ``timm.data.create_dataset`` reads.

A source has a length, ``read(index) -> (PIL image, class)`` and ``name(index)``. timm's folder and
archive data sets are read through their reader, because their own ``__getitem__`` puts the next
image in the place of one that does not decode, without a count.
"""

from __future__ import annotations

import os
import re
import tarfile
from pathlib import Path
from typing import Any, Protocol

import timm.data
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from torch.utils.data import IterableDataset

from training.data.digits import Digits
from training.data.pixels import decode, to_rgb
from training.errors import UserError

_OPEN_ERRORS = (ImportError, OSError, RuntimeError, AssertionError, ValueError, TypeError)
_PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")


class Source(Protocol):
    """Images by number."""

    classes: tuple[str, ...] | None

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, int]: ...

    def name(self, index: int) -> str: ...


class TimmSource:
    """A map-style timm or torchvision data set as a :class:`Source`."""

    def __init__(self, dataset: Any, mode: str) -> None:
        self.dataset, self.mode = dataset, mode
        self.reader = getattr(dataset, "reader", None)
        held = self.reader or dataset
        # Folders and torchvision say class_to_idx, archives class_name_to_idx.
        names = getattr(held, "class_to_idx", None) or getattr(held, "class_name_to_idx", None)
        self.classes = tuple(sorted(names, key=names.__getitem__)) if names else None

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        if self.reader is None:
            image, target = self.dataset[index]
        else:
            image, target, *_ = self.reader[index]
            if not isinstance(image, Image.Image):
                with image as stream:
                    image = decode(stream)
        image = to_rgb(image)
        return image if self.mode == "RGB" else image.convert(self.mode), int(target)

    def name(self, index: int) -> str:
        try:
            return str(self.dataset.filename(index, absolute=True))
        except (AttributeError, AssertionError, NotImplementedError):
            return f"image {index}"


def open_source(
    name: str,
    root: str | None,
    split: str,
    *,
    training: bool,
    in_chans: int = 3,
    batch_size: int = 1,
    seed: int = 0,
    class_map: str | None = None,
    download: bool = False,
    kwargs: dict[str, Any] | None = None,
) -> Source | IterableDataset:
    """Open one split of a data set.

    Returns a :class:`Source`, or timm's own iterable data set for the streaming formats. Raises
    :class:`UserError` for a missing root, a root without images, an empty class folder, an
    unknown format or one whose reader is not installed.
    """
    if name == "digits":
        return Digits(split)
    prefix = name.partition("/")[0].lower()
    plain = prefix in ("folder", "tar", "")
    if not plain and prefix not in _PREFIXES:
        raise UserError(
            f"data.name: unknown data set {name!r}; valid: digits, folder, "
            + ", ".join(f"{prefix}/NAME" for prefix in _PREFIXES)
        )
    if root is None and prefix in ("folder", "tar", "", "torch", "wds"):
        raise UserError(f"data.root is not set, and data set {name!r} needs it")
    must_exist = plain or (prefix == "torch" and not download)
    if must_exist and not os.path.exists(str(root)):
        raise UserError(f"data.root: {root!r} does not exist")
    if plain and os.path.isdir(str(root)):
        root = _split_folder(Path(str(root)), split)
        _check_class_folders(Path(root))
    options = dict(kwargs or {})
    _check_runs_nothing(prefix, root, split, options)
    if plain and str(root).endswith(".tar"):
        # timm may keep an index of a large archive as a pickle beside it, and would trust it.
        options.setdefault("cache_tarinfo", False)
    mode = "L" if in_chans == 1 else "RGB"
    try:
        dataset = timm.data.create_dataset(
            "" if plain else name,
            root=root,
            split=split,
            search_split=not plain,
            is_training=training,
            class_map=class_map or (None if not plain else ""),
            download=download,
            batch_size=batch_size,
            seed=seed,
            input_img_mode=mode,
            **options,
        )
    except (*_OPEN_ERRORS, tarfile.TarError) as error:
        raise UserError(f"cannot open data set {name!r} at {root!r}: {error}") from error
    return dataset if isinstance(dataset, IterableDataset) else TimmSource(dataset, mode)


def _check_runs_nothing(prefix: str, root: str | None, split: str, options: dict[str, Any]) -> None:
    """Raise for what would make a reader run code that the data, or the configuration, brings."""
    if options.get("trust_remote_code"):
        raise UserError("data.kwargs: trust_remote_code: true would run code of the data set")
    # webdataset hands addresses to a shell: pipe: as it is, s3: and others inside a command.
    for name, value in (("data.root", root or ""), ("split", split)):
        if prefix == "wds" and ("pipe:" in value or re.search(r"[^\w./:{}|,@%+=~ -]", value)):
            raise UserError(f"{name}: {value!r} could run a command; give a plain path or address")


def _split_folder(root: Path, split: str) -> str:
    """Return the sub-folder of ``root`` that holds ``split``, under one of its usual names."""
    synonyms = {
        "train": ("train", "training"),
        "validation": ("validation", "val", "valid", "eval", "evaluation"),
    }
    names = next((names for names in synonyms.values() if split in names), ())
    for name in (split, *names):
        if (root / name).exists():
            return str(root / name)
    raise UserError(
        f"data.root: {str(root)!r} has no folder for the split {split!r}; "
        f"looked for {', '.join(dict.fromkeys((split, *names)))}"
    )


def _check_class_folders(root: Path) -> None:
    """Raise for a class folder without images: timm would number classes as if without it.

    Sub-folders count with their parents, so that nested layouts pass.
    """
    extensions = get_img_extensions(as_set=True)

    def has_images(folder: Path) -> bool:
        found = False
        for parent, folders, files in os.walk(folder, followlinks=True):
            _check_links(parent, folders)
            found = found or any(Path(file).suffix.lower() in extensions for file in files)
        return found

    folders = sorted(path for path in root.iterdir() if path.is_dir())
    _check_links(str(root), [path.name for path in folders])
    if not folders and not has_images(root):
        raise UserError(f"no images in {str(root)!r}: one folder of images per class is expected")
    empty = [str(folder) for folder in folders if not has_images(folder)]
    if empty:
        raise UserError(
            f"class folder without images: {', '.join(empty)}; "
            f"remove it or add files ending in {', '.join(sorted(extensions))}"
        )


def _check_links(parent: str, folders: list[str]) -> None:
    """Raise for a link to a folder above it: its images would be counted dozens of times."""
    for name in folders:
        path = os.path.join(parent, name)
        if os.path.islink(path):
            target, inside = os.path.realpath(path), os.path.realpath(parent)
            if os.path.commonpath([target, inside]) == target:
                raise UserError(f"the link {path!r} leads back to {target!r}, which holds it")
