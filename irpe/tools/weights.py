"""Checkpoints: read without running anything that is hidden in the file, and written."""

import argparse
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..errors import IrpeError
from .torchfile import Refused, check_torch_file

# Names under which training codes wrap a state dict, in the order in which they are preferred.
_WRAPPERS = ("model", "state_dict")
TORCH = (".pth", ".pt", ".bin")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a file holds.

    Args:
        weights: the state dict.
        about: what stands beside it, as text: a safetensors header, or the options of the run.
    """

    weights: dict[str, Tensor]
    about: dict[str, str]

    @property
    def spec(self) -> str | None:
        """The encoding's string, where the file says it."""
        for name in ("rpe", "enc_rpe2d", "encoding"):
            if self.about.get(name) not in (None, "", "None", "none"):
                return self.about[name]
        return None


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a file, see ``read_checkpoint``."""
    return read_checkpoint(path).weights


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a ``.safetensors`` file or a torch file.

    A torch file may hold the state dict itself or wrap it under ``model`` or ``state_dict``.
    ``argparse.Namespace`` is the one class it may contain besides tensors and containers (the
    released files keep their options in one); any other is refused before it is built.

    Raises:
        IrpeError: for a file that is missing, truncated, of another format, or refused.
    """
    path = Path(path)
    if not path.is_file():
        raise IrpeError(f"checkpoint {str(path)!r} is not a file")
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, "pt") as file:
                about = file.metadata() or {}
            return Checkpoint(safetensors.torch.load_file(path), about)
        except Exception as error:  # a header can be wrong in as many ways as text can
            raise IrpeError(
                f"checkpoint {str(path)!r} is truncated or not a safetensors file: "
                f"{_one_line(error):.120}"
            ) from error
    content = _read_torch(path)
    return Checkpoint(_unwrap(content, path), _about(content))


def write_checkpoint(path: str | Path, held: Checkpoint) -> None:
    """Write a file in the format that its name says; nobody meets half of it.

    A torch file holds the state dict under ``model``, as the released ones do, and what is known
    about it as a dict under ``args``.

    Raises:
        IrpeError: for another ending.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", *TORCH):
        raise IrpeError(
            f"cannot write {str(path)!r}: a checkpoint's name ends in .safetensors, "
            f"{', '.join(TORCH)}"
        )
    # Cloned, because safetensors refuses tensors that share memory.
    weights = {name: value.contiguous().clone() for name, value in held.weights.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".safetensors":
            # Not save_file, which makes files that only their owner can read.
            temporary.write_bytes(safetensors.torch.save(weights, metadata=held.about))
        else:
            with temporary.open("wb") as file:
                torch.save({"model": weights, "args": held.about}, file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_torch(path: Path) -> Any:
    try:
        check_torch_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Refused as error:
        raise IrpeError(
            f"checkpoint {str(path)!r} refused: it wants to build {str(error)!r}, and only "
            "tensors, plain containers and argparse.Namespace are allowed"
        ) from error
    except pickle.UnpicklingError as error:
        # torch's own message advises an unsafe load; it is not passed on.
        raise IrpeError(f"checkpoint {str(path)!r} is truncated or not a torch file") from error
    except Exception as error:  # torch reports a damaged archive in half a dozen ways
        raise IrpeError(
            f"checkpoint {str(path)!r} is truncated or not a torch file: {_one_line(error):.120}"
        ) from error


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    tensors = isinstance(content, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    )
    if not tensors or not content:
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise IrpeError(
            f"checkpoint {str(path)!r} holds no weights: expected a mapping of names to tensors, "
            f"alone or under {' or '.join(map(repr, _WRAPPERS))}, but found {found!s:.160}"
        )
    # DistributedDataParallel prefixes every name.
    bare = {key.removeprefix("module."): value for key, value in content.items()}
    if len(bare) < len(content):
        raise IrpeError(f"checkpoint {str(path)!r} has names both with and without 'module.'")
    return bare


def _about(content: Any) -> dict[str, str]:
    args = content.get("args") if isinstance(content, dict) else None
    options = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(options, Mapping):
        return {}
    return {
        str(name): str(value)
        for name, value in options.items()
        if isinstance(value, str | int | float | bool)
    }


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
