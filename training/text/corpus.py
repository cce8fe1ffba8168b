"""Sources of text: the embedded standard library, files, or a Hugging Face data set.

The embedded corpus is the source code of Python's standard library, which needs no download. The
split of a file depends only on its name, so splits are the same for the same version of Python.
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
# Exceptions of datasets for missing names, splits and files, and without a connection.
_ERRORS = (ImportError, OSError, RuntimeError, ValueError, TypeError, KeyError)
SPLITS = ("train", "validation", "test")
# End of each split, as a fraction of the text.
_ENDS = {"train": 0.8, "validation": 0.9, "test": 1.0}

# Tests, third-party code, and files that only some distributions have.
_LEFT_OUT = {
    "__pycache__", "_distutils_system_mod.py", "dist-packages", "distutils", "ensurepip",
    "idle_test", "idlelib", "lib2to3", "macholib", "site-packages", "sitecustomize.py", "test",
    "tests", "tkinter", "turtledemo", "usercustomize.py",
}  # fmt: skip
# Generated when Python is built: _sysconfigdata, config-3.11-x86_64-linux-gnu, pydoc_data.
_GENERATED = ("_sysconfigdata", "config-", "pydoc_data")


@dataclass(frozen=True)
class Document:
    """A text with the name of its file, relative to the corpus and with forward slashes."""

    name: str
    text: str

    @property
    def package(self) -> str:
        """The top folder, or the file name without suffix: json for json/decoder.py."""
        return PurePosixPath(self.name).parts[0].removesuffix(".py")


def open_corpus(config: TextConfig, split: str) -> Iterable[Document]:
    """Return the documents of "train", "validation" or "test", in a fixed order.

    Raises:
        UserError: if the name is unknown, a path is missing, a file is empty or not UTF-8 text, or
            the split has no documents.
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
            raise UserError(f"data.{key} is not set, and all of data.root is for training")
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
    """Return the source files of Python's standard library, in the order of their names.

    Tests, generated files and files that only some distributions have are left out.

    Raises:
        UserError: if this Python has no source files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = read_folder(root, [".py"], _not_library) if root.is_dir() else []
    if not documents:
        raise UserError(
            f"data.name: stdlib finds no Python files in {str(root)!r}; "
            "give your own text with data.name: files and data.root"
        )
    return documents


def split_of(name: str) -> str:
    """Return the split of the file ``name``, by a hash of the name."""
    digest = hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest()
    share = int.from_bytes(digest, "little") / 2**64
    return next(split for split in SPLITS if share < _ENDS[split] or split == SPLITS[-1])


def read_files(path: Path, extensions: Sequence[str] | None, key: str) -> list[Document]:
    """Read a file, or a folder recursively; ``key``: name of the option, for errors.

    Raises:
        UserError: see :func:`open_corpus`.
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
        raise UserError(f"{key}: {str(path)!r} has no text file {kinds}that is not empty")
    return documents


def read_folder(
    root: Path,
    extensions: Sequence[str] | None,
    leave_out: Callable[[Path], bool] | None = None,
) -> list[Document]:
    """Read the files of a folder recursively, without hidden and empty ones, in order of names.

    Args:
        extensions: suffixes of the files to read; None: all files.
        leave_out: returns whether to leave out a file or folder, from its path relative to root.
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
    """Read UTF-8 text, without byte order mark and with universal newlines."""
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
    """Return the part of a single file for a split: eight tenths, the ninth, or the last one."""

    size = len(document.text)

    def end(share: float) -> int:
        place = round(size * share)
        # After a line, if one ends nearby.
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
    """The rows of a Hugging Face data set as documents, read on demand."""

    def __init__(self, rows: Any, column: str) -> None:
        self.rows, self.column = rows, column

    @property
    def fingerprint(self) -> str | None:
        """The data set's fingerprint, if it has one."""
        own = getattr(self.rows, "_fingerprint", None)
        return None if own is None else f"{own} {self.column}"

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Document]:
        for number, row in enumerate(self.rows):
            text = row[self.column]
            if not isinstance(text, str):
                raise UserError(f"data.column: {self.column!r} has {text!r:.60} in row {number}")
            yield Document(f"row {number}", text)


def load_rows(name: str, split: str, columns: tuple[str, ...], kwargs: dict[str, Any]) -> Any:
    """Return a split of a Hugging Face data set, whose rows are dicts.

    Raises:
        UserError: if ``datasets`` is not installed, the data set cannot be opened, or a column is
            missing.
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
