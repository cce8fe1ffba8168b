"""Write files so that a reader never meets half of one, and keep the newest states of a run.

A state is one file with all that a run goes on from, so no set of files can be torn apart. Its name
ends in a checksum of its content: a file that was cut short, or damaged later, is not one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from irpe.tools.torchfile import Refused, check_torch_file
from training.errors import UserError, one_line

_STATE = re.compile(r"state-epoch(\d+)-step(\d+)-([0-9a-f]{16})\.pt")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside ``path``; on success it takes ``path``'s place at once."""
    with _temporary(path) as temporary:
        yield temporary
        _rename(temporary, path)


def save_weights(path: Path, model: nn.Module, about: dict[str, Any]) -> None:
    """Write the state dict as safetensors, with ``about`` (its values as text) in the header."""
    save_tensors(path, model.state_dict(), about)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Write tensors as safetensors, with ``about`` (its values as text) in the header."""
    # Cloned, because safetensors refuses tensors that share memory.
    own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    header = {key: str(value) for key, value in about.items()}
    # Not save_file, which makes files that only their owner can read.
    content = safetensors.torch.save(own, metadata=header)
    _make_folder(path.parent)
    with replacing(path) as temporary:
        temporary.write_bytes(content)


class States:
    """The states in a folder: ``state-epoch2-step500-CHECKSUM.pt``, at most ``keep`` of them.

    The epoch counts those that are finished, the step those of the whole run.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def paths(self) -> list[Path]:
        """Return the states there are, the newest first."""
        if not self.folder.is_dir():
            return []
        named = [(path, _STATE.fullmatch(path.name)) for path in self.folder.iterdir()]
        order = {path: (int(match[2]), int(match[1])) for path, match in named if match}
        return sorted(order, key=order.__getitem__, reverse=True)

    def save(self, state: dict[str, Any]) -> Path:
        """Write ``state`` (tensors and plain containers); then remove what is too old to keep.

        Raises :class:`UserError` where it cannot be written; older states are then all there.
        """
        _make_folder(self.folder)
        path = self.folder / f"state-epoch{state['epoch']}-step{state['step']}"
        with _temporary(path) as temporary:
            try:
                torch.save(state, temporary)
            except RuntimeError as error:  # how torch reports a full disk
                raise OSError(0, one_line(error)) from error
            path = path.with_name(f"{path.name}-{_checksum(temporary)}.pt")
            _rename(temporary, path)
        for old in self.paths()[self.keep :]:
            old.unlink(missing_ok=True)
        return path

    def newest(self, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest state that verifies, with its path; None if there is none.

        ``say`` gets a line for each newer one that does not.
        """
        for path in self.paths():
            try:
                return path, read_state(path)
            except UserError as error:
                say(str(error))
        return None

    def forget_after(self, path: Path) -> None:
        """Put newer states than ``path`` aside (none verified), and remove half-written files."""
        for newer in self.paths()[: self.paths().index(path)]:
            newer.rename(newer.with_name(f"{newer.name}.damaged"))
        for torn in self.folder.glob(".*.tmp"):
            torn.unlink()


def read_state(path: Path) -> dict[str, Any]:
    """Read a state if its checksum is right; only tensors and plain containers are built.

    Raises :class:`UserError` for a file that is damaged, or asks for more than that.
    """
    match = _STATE.fullmatch(path.name)
    try:
        if match is not None and _checksum(path) != match[3]:
            raise ValueError("its checksum is not that of its name")
        check_torch_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError("it holds something else")
    except Refused as error:
        raise UserError(
            f"resume: {str(path)!r} refused: it wants to build {str(error)!r}, and only tensors "
            "and plain containers are allowed"
        ) from error
    except Exception as error:  # torch reports a damaged archive in half a dozen ways
        # torch's own message goes on to advise an unsafe load; it is not passed on.
        reason = "" if isinstance(error, pickle.UnpicklingError) else f": {one_line(error):.120}"
        raise UserError(
            f"resume: {str(path)!r} is truncated or not a training state{reason}"
        ) from error
    return state


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Give a name beside ``path``, of which nothing is left afterwards."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    finally:
        # A failure to remove it must not hide why it was not finished.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def _rename(temporary: Path, path: Path) -> None:
    """Let ``temporary`` take ``path``'s place, both the content and the name on the disk."""
    _flush(temporary)
    os.replace(temporary, path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
