"""Read weights written by others, without running anything that is hidden in the file."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from training.errors import UserError, one_line
from training.torchfile import Refused, check_torch_file

# Names under which training codes wrap a state dict, in the order in which they are preferred.
_WRAPPERS = ("model", "state_dict")
_SHOWN = 6


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a ``.safetensors`` file or a torch file.

    A torch file may hold the state dict itself or wrap it under ``model`` or ``state_dict``.
    ``argparse.Namespace`` is the one class it may contain besides tensors and containers (the
    released files keep their options in one); any other is refused before it is built.

    Raises :class:`UserError` for a file that is missing, truncated, of another format, or refused.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {str(path)!r} is not a file")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except Exception as error:  # a header can be wrong in as many ways as text can
            raise UserError(
                f"checkpoint {str(path)!r} is truncated or not a safetensors file: "
                f"{one_line(error):.120}"
            ) from error
    return _unwrap(_read_torch(path), path)


def _read_torch(path: Path) -> Any:
    try:
        check_torch_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Refused as error:
        raise UserError(
            f"checkpoint {str(path)!r} refused: it wants to build {str(error)!r}, and only "
            "tensors, plain containers and argparse.Namespace are allowed"
        ) from error
    except pickle.UnpicklingError as error:
        # torch's own message advises an unsafe load; it is not passed on.
        raise UserError(f"checkpoint {str(path)!r} is truncated or not a torch file") from error
    except Exception as error:  # torch reports a damaged archive in half a dozen ways
        raise UserError(
            f"checkpoint {str(path)!r} is truncated or not a torch file: {one_line(error):.120}"
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
        raise UserError(
            f"checkpoint {str(path)!r} holds no weights: expected a mapping of names to tensors, "
            f"alone or under {' or '.join(map(repr, _WRAPPERS))}, but found {found!s:.160}"
        )
    # DistributedDataParallel prefixes every name.
    bare = {key.removeprefix("module."): value for key, value in content.items()}
    if len(bare) < len(content):
        raise UserError(f"checkpoint {str(path)!r} has names both with and without 'module.'")
    return bare


def apply_weights(
    model: nn.Module,
    weights: dict[str, Tensor],
    path: str | Path,
    options: str = "model.name, model.kwargs and rpe",
) -> None:
    """Load ``weights`` into ``model``, all of them or none.

    ``options`` are what decides about the architecture, for the error message. Raises
    :class:`UserError` that lists the keys which are missing, unexpected, of another shape or kind.
    """
    state = model.state_dict()
    own = {key: tuple(value.shape) for key, value in state.items()}
    given = {key: tuple(value.shape) for key, value in weights.items()}
    # Floating point of another precision is converted.
    kinds = [
        f"{key} {weights[key].dtype} in the file, {value.dtype} in the model"
        for key, value in state.items()
        if key in weights and weights[key].is_floating_point() != value.is_floating_point()
    ]
    differences = [
        ("missing in the file", [key for key in own if key not in given]),
        ("unknown to the model", [key for key in given if key not in own]),
        (
            "of another shape",
            [
                f"{key} {list(given[key])} in the file, {list(own[key])} in the model"
                for key in own
                if key in given and given[key] != own[key]
            ],
        ),
        ("of another kind", kinds),
    ]
    parts = []
    for kind, items in differences:
        if items:
            more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
            parts.append(f"{len(items)} {kind}: {', '.join(items[:_SHOWN])}{more}")
    if parts:
        raise UserError(
            f"checkpoint {str(path)!r} is of another architecture than this model "
            f"({'; '.join(parts)}); {options} must be those it was made with"
        )
    model.load_state_dict(weights)
