"""Checkpoints: weights files and training states, written atomically.

A training state is one file, from which a run resumes. Its name ends in a checksum of its content,
so that damaged files are recognised.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from irpe.files import metadata
from irpe.files.torchfile import Refused, check_torch_file
from training.errors import UserError, one_line

_STATE = re.compile(r"state-epoch(\d+)-step(\d+)-([0-9a-f]{16})\.pt")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path, which replaces ``path`` atomically on success."""
    with _temporary(path) as temporary:
        yield temporary
        _rename(temporary, path)


def save_weights(path: Path, model: nn.Module, about: dict[str, Any]) -> None:
    """Write the state dict as safetensors, with ``about`` (values as text) in the header.

    The header also has the metadata of ``irpe.save``, so that ``irpe.load`` attaches the encodings.
    """
    save_tensors(path, model.state_dict(), {**metadata(model), **about})


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Write tensors as safetensors, with ``about`` (values as text) in the header."""
    # Clone: safetensors refuses tensors that share memory.
    own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    header = {key: str(value) for key, value in about.items()}
    # save_file would create files that only their owner can read.
    content = safetensors.torch.save(own, metadata=header)
    with replacing(path) as temporary:
        temporary.parent.mkdir(exist_ok=True)
        temporary.write_bytes(content)


class States:
    """The training states in a folder: ``state-epoch2-step500-CHECKSUM.pt``.

    The epoch counts finished epochs, the step counts the steps of the run.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def paths(self) -> list[Path]:
        """Return the paths of the states, the newest first."""
        if not self.folder.is_dir():
            return []
        named = [(path, _STATE.fullmatch(path.name)) for path in self.folder.iterdir()]
        order = {path: (int(match[2]), int(match[1])) for path, match in named if match}
        return sorted(order, key=order.__getitem__, reverse=True)

    def save(self, state: dict[str, Any]) -> Path:
        """Write ``state`` (tensors and plain containers), then remove the oldest states.

        Raises:
            UserError: if it cannot be written; the older states then remain.
        """
        path = self.folder / f"state-epoch{state['epoch']}-step{state['step']}"
        with _temporary(path) as temporary:
            try:
                self.folder.mkdir(exist_ok=True)
                torch.save(state, temporary)
            except RuntimeError as error:  # torch raises this for a full disk
                raise OSError(0, one_line(error)) from error
            path = path.with_name(f"{path.name}-{checksum(temporary)}.pt")
            _rename(temporary, path)
        for old in self.paths()[self.keep :]:
            old.unlink(missing_ok=True)
        return path

    def newest(self) -> tuple[Path, dict[str, Any]]:
        """Return path and content of the newest valid state; warn of newer invalid ones.

        Raises:
            UserError: if no state is valid.
        """
        problems: list[str] = []
        for path in self.paths():
            try:
                state = read_state(path)
            except UserError as error:
                problems.append(str(error))
                continue
            for line in problems:
                print(f"warning: {line}; using the state before it", file=sys.stderr)
            return path, state
        raise UserError("; ".join(problems))

    def forget_after(self, path: Path) -> None:
        """Rename states newer than ``path``, which are damaged; remove incomplete files."""
        for newer in self.paths()[: self.paths().index(path)]:
            newer.rename(newer.with_name(f"{newer.name}.damaged"))
        for torn in self.folder.glob(".*.tmp"):
            torn.unlink()


def read_state(path: Path) -> dict[str, Any]:
    """Read a state of tensors and plain containers, after checking its checksum.

    Raises:
        UserError: if the file is damaged or contains other classes.
    """
    match = _STATE.fullmatch(path.name)
    try:
        if match is not None and checksum(path) != match[3]:
            raise ValueError("its checksum differs from its name")
        check_torch_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError("it is not a mapping")
    except Refused as error:
        raise UserError(
            f"resume: {str(path)!r} refused: it builds {str(error)!r}, and only tensors "
            "and plain containers are allowed"
        ) from error
    except Exception as error:  # torch raises many exceptions for damaged archives
        # Hide torch's message, which advises an unsafe load.
        reason = "" if isinstance(error, pickle.UnpicklingError) else f": {one_line(error):.120}"
        raise UserError(
            f"resume: {str(path)!r} is truncated or not a training state{reason}"
        ) from error
    return state


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; remove the file afterwards."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    finally:
        # Do not hide the original error.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def checksum(path: Path) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _rename(temporary: Path, path: Path) -> None:
    """Rename ``temporary`` to ``path``, and flush content and name to the disk."""
    for flushed in (temporary, path.parent):
        number = os.open(flushed, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
        if flushed == temporary:
            os.replace(temporary, path)
