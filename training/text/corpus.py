"""Where text comes from: the embedded standard library, files, or a Hugging Face data set.

The embedded corpus is the source code of Python's own standard library, which every machine that
runs these scripts has. A file's name alone decides its split, so the split is the same on every
machine with the same version of Python.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from training.errors import UserError
from training.text.options import TextConfig

PREFIX = "hfds/"
# What datasets raises for names, splits and files that do not exist, and without a connection.
_ERRORS = (ImportError, OSError, RuntimeError, ValueError, TypeError, KeyError)
SPLITS = ("train", "validation", "test")
# Where a split ends: eight tenths are for training.
_ENDS = {"train": 0.8, "validation": 0.9, "test": 1.0}

# Tests, what is not Python's own, and what some distributions leave out or add.
_LEFT_OUT = {
    "__pycache__", "_distutils_system_mod.py", "dist-packages", "distutils", "ensurepip",
    "idle_test", "idlelib", "lib2to3", "macholib", "site-packages", "sitecustomize.py", "test",
    "tests", "tkinter", "turtledemo", "usercustomize.py",
}  # fmt: skip
# Written when Python is built: _sysconfigdata, config-3.11-x86_64-linux-gnu, pydoc_data.
_GENERATED = ("_sysconfigdata", "config-", "pydoc_data")


@dataclass(frozen=True)
class Document:
    """A text with the name of its file, relative to the corpus and with forward slashes."""

    name: str
    text: str

    @property
    def package(self) -> str:
        """The top folder, or the file without its ending: json/decoder.py is of json."""
        return PurePosixPath(self.name).parts[0].removesuffix(".py")


def open_corpus(config: TextConfig, split: str) -> Iterable[Document]:
    """Return the documents of "train", "validation" or "test", in a fixed order.

    They can be iterated over many times. Raises :class:`UserError` for an unknown name, a missing
    path, a file that is empty or not UTF-8 text, a split without documents.
    """
    if config.name.startswith(PREFIX):
        names = (config.train_split, config.val_split, config.test_split)
        own_name = names[SPLITS.index(split)]
        name = config.name.removeprefix(PREFIX)
        return _Rows(load_rows(name, own_name, (config.column,), config.kwargs), config.column)
    if config.name == "stdlib":
        return _split(standard_library(), split, "the standard library")
    if config.name != "files":
        raise UserError(
            f"data.name: unknown text {config.name!r}; valid: stdlib, files, {PREFIX}NAME"
        )
    key = {"validation": "val_root", "test": "test_root"}.get(split, "root")
    if key != "root" and (own := getattr(config, key)) is not None:
        return read_files(Path(own), config.extensions, f"data.{key}")
    if config.root is None:
        raise UserError("data.root is not set, and data.name: files needs it")
    documents = read_files(Path(config.root), config.extensions, "data.root")
    if config.val_root or config.test_root:
        if split != "train":
            raise UserError(f"data.{key} is not set, and data.root is all for training")
        return documents
    if Path(config.root).is_file():
        return _cut(documents[0], split)
    return _split(documents, split, f"data.root: {config.root!r}")


def digest(documents: Iterable[Document]) -> str:
    """Return a digest of the names and the content of documents."""
    if isinstance(documents, _Rows) and documents.fingerprint is not None:
        return documents.fingerprint
    found = hashlib.blake2b(digest_size=16)
    for document in documents:
        for part in (document.name, document.text):
            content = part.encode("utf-8", "surrogateescape")
            found.update(len(content).to_bytes(8, "little") + content)
    return found.hexdigest()


def standard_library() -> list[Document]:
    """Return Python's own source files, in the order of their names; tests are left out.

    So is what is generated when Python is built, and what only some distributions have. Raises
    :class:`UserError` where this Python has no source files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = read_folder(root, [".py"], _not_library) if root.is_dir() else []
    if not documents:
        raise UserError(
            f"data.name: stdlib finds no Python files in {str(root)!r}; "
            "give text of your own with data.name: files and data.root"
        )
    return documents


def split_of(name: str) -> str:
    """Return the split of the file ``name``: a fixed function of the name."""
    digest = hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest()
    share = int.from_bytes(digest, "little") / 2**64
    return next(split for split in SPLITS if share < _ENDS[split] or split == SPLITS[-1])


def read_files(path: Path, extensions: Sequence[str] | None, key: str) -> list[Document]:
    """Read a file, or a folder and the folders in it. ``key`` is the option that gave the path.

    Raises :class:`UserError`; see :func:`open_corpus`.
    """
    if not path.exists():
        raise UserError(f"{key}: {str(path)!r} does not exist")
    if path.is_file():
        document = Document(path.name, _read(path))
        if not document.text.strip():
            raise UserError(f"{key}: {str(path)!r} is empty; a text file is expected")
        return [document]
    documents = read_folder(path, extensions)
    if not documents:
        kinds = f"ending in {', '.join(extensions)} " if extensions else ""
        raise UserError(f"{key}: {str(path)!r} holds no text file {kinds}that is not empty")
    return documents


def read_folder(
    root: Path,
    extensions: Sequence[str] | None,
    leave_out: Callable[[Path], bool] | None = None,
) -> list[Document]:
    """Read the files in and below ``root``, but hidden and empty ones, in the order of names.

    ``leave_out`` is asked of each file and each folder, by its path relative to ``root``.
    """
    names = []
    for folder, folders, files in os.walk(root):
        here = Path(folder).relative_to(root)

        def keep(name: str, here: Path = here) -> bool:
            return not name.startswith(".") and not (leave_out and leave_out(here / name))

        folders[:] = filter(keep, folders)
        fitting = (name for name in files if not extensions or name.endswith(tuple(extensions)))
        names += [(here / name).as_posix() for name in fitting if keep(name)]
    documents = (Document(name, _read(root / name)) for name in sorted(names))
    return [document for document in documents if document.text.strip()]


def _not_library(name: Path) -> bool:
    return name.name in _LEFT_OUT or name.parts[0].startswith(_GENERATED)


def _read(path: Path) -> str:
    """Read UTF-8 text without its byte order mark; every kind of line break becomes a newline."""
    advice = "UTF-8 text is expected; data.extensions can leave files of a folder out"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{str(path)!r} is not text (byte {error.start}); {advice}") from error
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}") from error
    if "\0" in text:
        raise UserError(f"{str(path)!r} is not text, it has zero bytes; {advice}")
    return text


def _split(documents: list[Document], split: str, where: str) -> list[Document]:
    found = [document for document in documents if split_of(document.name) == split]
    if not found:
        raise UserError(
            f"{where}: none of {len(documents)} files falls into the split {split!r}; "
            "give one with data.val_root and data.test_root"
        )
    return found


def _cut(document: Document, split: str) -> list[Document]:
    """Return a split's part of a single file: the first eight tenths, the ninth, the last."""

    size = len(document.text)

    def end(share: float) -> int:
        place = round(size * share)
        # After a line, if one ends near by.
        return document.text.rfind("\n", place - size // 20, place) + 1 or place

    cuts = [0, *(end(_ENDS[name]) for name in SPLITS[:-1]), size]
    number = SPLITS.index(split)
    text = document.text[cuts[number] : cuts[number + 1]]
    if not text:
        raise UserError(
            f"data.root: the file {document.name!r} is too short to be split "
            f"({size} characters); give data.val_root and data.test_root"
        )
    return [Document(document.name, text)]


class _Rows:
    """The rows of a Hugging Face data set as documents, read when they are asked for."""

    def __init__(self, rows: Any, column: str) -> None:
        self.rows, self.column = rows, column

    @property
    def fingerprint(self) -> str | None:
        """The data set's own digest of its content, if it has one."""
        own = getattr(self.rows, "_fingerprint", None)
        return None if own is None else f"{own} {self.column}"

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Document]:
        for number, row in enumerate(self.rows):
            text = row[self.column]
            if not isinstance(text, str):
                raise UserError(f"data.column: {self.column!r} holds {text!r:.60} in row {number}")
            yield Document(f"row {number}", text)


def load_rows(name: str, split: str, columns: tuple[str, ...], kwargs: dict[str, Any]) -> Any:
    """Return a split of the data set ``name`` (without the prefix), whose rows are dicts.

    Raises :class:`UserError` where ``datasets`` is not installed, the data set cannot be opened,
    or a column is missing.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(
            f"data.name: {PREFIX}{name} needs the datasets package: pip install datasets"
        ) from error
    try:
        rows = load_dataset(name, split=split, **kwargs)
    except _ERRORS as error:
        raise UserError(f"cannot open data set {name!r}, split {split!r}: {error}") from error
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise UserError(
            f"data set {name!r} has no column {', '.join(missing)}; "
            f"it has {', '.join(rows.column_names)}"
        )
    return rows
