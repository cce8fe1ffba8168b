"""Sources of images: digits, Fashion-MNIST or data sets of ``timm.data.create_dataset``.

A source has a length, ``read(index) -> (PIL image, class)``, ``name(index)`` and ``classes``, names
or None. :class:`ClassFolder` reads folders and archives; timm would use the last folder of a path
as the class. timm's other data sets are read through their reader: their ``__getitem__`` silently
replaces images that do not decode.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

import timm.data
from PIL import Image, ImageOps
from torch.utils.data import IterableDataset

from training.data.classes import ClassFolder, read_class_map
from training.data.digest import Digest, parts_below, stat_digest
from training.data.digits import Digits
from training.data.fashion import Fashion
from training.data.pixels import decode, to_rgb
from training.errors import UserError

_OPEN_ERRORS = (ImportError, OSError, RuntimeError, AssertionError, ValueError, TypeError)
_PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")


class TimmSource:
    """A map-style timm or torchvision data set as a source."""

    def __init__(self, dataset: Any, mode: str, *, exif: bool = False) -> None:
        self.dataset, self.mode, self.exif = dataset, mode, exif
        self.reader = getattr(dataset, "reader", None)
        held = self.reader or dataset
        # Folders and torchvision have class_to_idx, archives class_name_to_idx.
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
        image = to_rgb(ImageOps.exif_transpose(image) if self.exif else image)
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
    exif: bool = False,
    kwargs: dict[str, Any] | None = None,
) -> Any:
    """Open one split of a data set.

    Args:
        in_chans: 1 for grey images, 3 for colour.
        batch_size: batch size, for streams.
        seed: seed of the order, for streams.

    Returns:
        A source, or timm's iterable data set for streaming formats.

    Raises:
        UserError: if the root is missing or has no images, a class folder is empty, or the format
            is unknown or its reader not installed.
    """
    if in_chans not in (1, 3):
        raise UserError(f"model.in_chans: {in_chans}; images are read as grey (1) or colour (3)")
    mode = "L" if in_chans == 1 else "RGB"
    if name == "digits":
        return Digits(split, mode)
    if name == "fashion":
        return Fashion(split, mode, root, download=download)
    prefix = name.partition("/")[0].lower()
    plain = prefix in ("folder", "tar", "")
    if not plain and prefix not in _PREFIXES:
        raise UserError(
            f"data.name: unknown data set {name!r}; valid: digits, fashion, folder, "
            + ", ".join(f"{prefix}/NAME" for prefix in _PREFIXES)
        )
    if root is None and prefix in ("folder", "tar", "", "torch", "wds"):
        raise UserError(f"data.root is not set, and data set {name!r} needs it")
    must_exist = plain or (prefix == "torch" and not download)
    if must_exist and not os.path.exists(str(root)):
        raise UserError(f"data.root: {root!r} does not exist")
    if plain:
        return ClassFolder(str(root), split, class_map, mode, exif=exif)
    options = dict(kwargs or {})
    _check_runs_nothing(prefix, root, split, options)
    numbers = None
    if class_map is not None:
        numbers = {name: number for number, name in enumerate(read_class_map(class_map))}
    try:
        dataset = timm.data.create_dataset(
            name,
            root=root,
            split=split,
            is_training=training,
            class_map=numbers,
            download=download,
            batch_size=batch_size,
            seed=seed,
            input_img_mode=mode,
            **options,
        )
    except _OPEN_ERRORS as error:
        raise UserError(f"cannot open data set {name!r} at {root!r}: {error}") from error
    return dataset if isinstance(dataset, IterableDataset) else TimmSource(dataset, mode, exif=exif)


def data_digest(sources: Iterable[Any], root: str | None) -> Digest:
    """Return the digest of the files of ``sources``.

    For timm's data sets, these are the files in ``root``, such as shards, and cache files of
    Hugging Face data sets. The embedded digits have none.
    """
    parts: dict[str, list[str]] = {}
    for source in sources:
        if isinstance(source, ClassFolder):
            parts.update(source.parts())
        elif isinstance(source, Fashion):
            parts.update(parts_below(str(source.folder)))
        elif not isinstance(source, Digits):
            parts.update(parts_below(root) if root else {})
            held = getattr(getattr(source, "reader", None), "dataset", None)
            for file in getattr(held, "cache_files", None) or ():
                parts[file["filename"]] = [file["filename"]]
    return stat_digest(parts)


def _check_runs_nothing(prefix: str, root: str | None, split: str, options: dict[str, Any]) -> None:
    """Raise for options that would make a reader run code of the data or the configuration."""
    if options.get("trust_remote_code"):
        raise UserError("data.kwargs: trust_remote_code: true would run code of the data set")
    # webdataset passes addresses to a shell: pipe: unmodified, s3: and others in a command.
    for name, value in (("data.root", root or ""), ("split", split)):
        if prefix == "wds" and ("pipe:" in value or re.search(r"[^\w./:{}|,@%+=~ -]", value)):
            raise UserError(f"{name}: {value!r} could run a command; give a plain path or address")
