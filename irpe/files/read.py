"""Read checkpoints without running code from the file, and write them."""

import argparse
import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import IrpeError
from .torchfile import Refused, check_torch_file

# Keys of state dicts in the files of training codes; the first that exists is read.
_WRAPPERS = ("model", "state_dict", "model_ema", "state_dict_ema")
TORCH = (".pth", ".pt", ".bin")
# Files of transformers and timm, then of a run; the first that exists is read.
_IN_FOLDERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "checkpoints/best.safetensors",
    "checkpoints/last.safetensors",
)
_SPEC_NAMES = ("rpe", "enc_rpe2d", "encoding")  # options of training scripts


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The content of a file.

    Args:
        weights: the state dict.
        about: metadata as text: a safetensors header, or the options of the run.
    """

    weights: dict[str, Tensor]
    about: dict[str, str]

    @property
    def specs(self) -> dict[str, str] | None:
        """The spec of each module with encodings, by path; None if the file has no such list.

        Raises:
            IrpeError: if the list is not a JSON object of strings.
        """
        if "irpe" not in self.about:
            return None
        specs = read_json(self.about["irpe"])
        if not isinstance(specs, dict) or not all(isinstance(s, str) for s in specs.values()):
            raise IrpeError(
                f"the file's 'irpe' is {self.about['irpe']:.80}, not a JSON object of specs by path"
            )
        return specs

    @property
    def spec(self) -> str | None:
        """The spec of the whole model; None if it is not in the file, or modules differ."""
        if self.specs is not None:
            several = set(self.specs.values())
            return several.pop() if len(several) == 1 else None
        for name in _SPEC_NAMES:
            if self.about.get(name) not in (None, "", "None", "none"):
                return self.about[name]
        return None


def read_json(text: str) -> Any:
    """Return the value of a JSON text, or None if it is invalid."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def weight_files(path: str | Path) -> list[Path]:
    """Return the files with the weights of a checkpoint: one, or the shards of an index.

    Args:
        path: a file, an index of shards (``.index.json``), a folder of transformers'
            ``save_pretrained`` or timm's ``save_for_hf``, or a run directory of ``train_*.py``
            (its best weights).
    """
    path = Path(path)
    if path.is_dir():
        found = next((path / name for name in _IN_FOLDERS if (path / name).is_file()), None)
        if found is None:
            raise IrpeError(f"folder {str(path)!r} has none of {', '.join(_IN_FOLDERS)}")
        path = found
    if not path.is_file():
        raise IrpeError(f"checkpoint {str(path)!r} is not a file")
    if path.suffix != ".json":
        return [path]
    index = read_json(path.read_text(encoding="utf-8"))
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise IrpeError(f"{str(path)!r} is not an index of shards: it has no 'weight_map'")
    names = sorted({str(name) for name in shards.values()})
    for name in names:
        if name != Path(name).name:
            raise IrpeError(f"{str(path)!r} names a shard outside its folder: {name!r}")
    return [path.parent / name for name in names]


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint, see ``read_checkpoint``."""
    return read_checkpoint(path).weights


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint: a ``.safetensors`` file, a torch file, or a folder or index of shards.

    A torch file contains the state dict itself or a mapping with it under ``model``,
    ``state_dict``, ``model_ema`` or ``state_dict_ema``. Besides tensors and containers it may
    contain ``argparse.Namespace`` (the released files store their options in it); any other class
    raises before it is built. The prefixes ``module.`` and ``_orig_mod.`` are removed.

    Args:
        path: see ``weight_files``.

    Raises:
        IrpeError: if the file is missing, truncated, of another format, or refused.
    """
    weights: dict[str, Tensor] = {}
    about: dict[str, str] = {}
    for file in weight_files(path):
        held = _read_file(file)
        weights |= held.weights
        about |= held.about
    return Checkpoint(weights, {**_beside(file), **about})


def write_checkpoint(path: str | Path, held: Checkpoint) -> None:
    """Write a file in the format of its suffix, atomically.

    A torch file has the state dict under ``model``, as the released files, and the metadata as a
    dict under ``args``.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", *TORCH):
        raise IrpeError(
            f"cannot write {str(path)!r}: a checkpoint's name ends in .safetensors, "
            f"{', '.join(TORCH)}"
        )
    if not path.parent.is_dir():
        raise IrpeError(f"cannot write {str(path)!r}: {str(path.parent)!r} is not a folder")
    # Clone: safetensors refuses tensors that share memory.
    weights = {name: value.contiguous().clone() for name, value in held.weights.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".safetensors":
            # save_file would create files that only their owner can read.
            content = safetensors("write", path).torch.save(weights, metadata=held.about)
            temporary.write_bytes(content)
        else:
            with temporary.open("wb") as file:
                torch.save({"model": weights, "args": held.about}, file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def safetensors(what: str, path: Path) -> Any:
    """Return the safetensors library; raise IrpeError if it is not installed."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise IrpeError(
            f"cannot {what} {str(path)!r}: safetensors is not installed: pip install safetensors"
        ) from error
    return safetensors


def _read_file(path: Path) -> Checkpoint:
    if not path.is_file():
        raise IrpeError(f"checkpoint {str(path)!r} is not a file")
    if path.suffix == ".safetensors":
        library = safetensors("read", path)
        try:
            with library.safe_open(path, "pt") as file:
                about = file.metadata() or {}
            return Checkpoint(_bare(library.torch.load_file(path), path), about)
        except IrpeError:
            raise
        except Exception as error:  # a damaged header raises many exceptions
            raise IrpeError(
                f"checkpoint {str(path)!r} is truncated or not a safetensors file: "
                f"{_one_line(error):.120}"
            ) from error
    content = _read_torch(path)
    return Checkpoint(_unwrap(content, path), _about(content))


def _beside(file: Path) -> dict[str, str]:
    """Return the specs and timm's model from the ``config.json`` of the same folder."""
    config = file.parent / "config.json"
    content = read_json(config.read_text(encoding="utf-8")) if config.is_file() else None
    if not isinstance(content, dict):
        return {}
    about = {"irpe": json.dumps(content["irpe"])} if "irpe" in content else {}
    if "architecture" in content and "pretrained_cfg" in content:
        about["irpe_model"] = json.dumps(content)
    return about


def _read_torch(path: Path) -> Any:
    try:
        check_torch_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Refused as error:
        raise IrpeError(
            f"checkpoint {str(path)!r} refused: it builds {str(error)!r}, and only "
            "tensors, plain containers and argparse.Namespace are allowed"
        ) from error
    except pickle.UnpicklingError as error:
        # Hide torch's message, which advises an unsafe load.
        raise IrpeError(f"checkpoint {str(path)!r} is truncated or not a torch file") from error
    except Exception as error:  # a damaged archive raises many exceptions
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
            f"checkpoint {str(path)!r} has no weights: expected a mapping of names to tensors, "
            f"alone or under {' or '.join(map(repr, _WRAPPERS))}, but found {found!s:.160}"
        )
    return _bare(content, path)


def _bare(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Remove the prefixes of DistributedDataParallel and torch.compile from the names."""
    bare = {k.removeprefix("module.").replace("_orig_mod.", ""): v for k, v in weights.items()}
    if len(bare) < len(weights):
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
