"""Write checkpoints so that a reader never meets half of one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from training.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside ``path``; on success it takes ``path``'s place at once."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_weights(path: Path, model: nn.Module, about: dict[str, Any]) -> None:
    """Write the state dict as safetensors, with ``about`` (its values as text) in the header."""
    tensors = {
        # Cloned, because safetensors refuses tensors that share memory.
        name: value.detach().cpu().contiguous().clone()
        for name, value in model.state_dict().items()
    }
    header = {key: str(value) for key, value in about.items()}
    # Not save_file, which makes files that only their owner can read.
    _write(path, lambda name: name.write_bytes(safetensors.torch.save(tensors, metadata=header)))


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain containers as a torch file that ``weights_only=True`` reads."""
    _write(path, lambda name: torch.save(state, name))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        try:
            write(temporary)
        except (RuntimeError, safetensors.SafetensorError) as error:
            # Both libraries report a full disk in their own way.
            raise OSError(0, str(error)) from error
