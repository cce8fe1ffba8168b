"""timm's models by name, with encodings and weights, for several subcommands."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import timm
import timm.data
import torch
from torch import Tensor, nn

from .. import files, zoo  # zoo registers the published names
from ..errors import IrpeError
from ..files.read import read_checkpoint, read_json
from ..hosts import attach
from ..spec import Spec

_SHOWN = 3


def create(
    name: str,
    size: tuple[int, int] | None = None,
    pretrained: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Create a timm model or a published one, for evaluation.

    Args:
        name: name in timm's registry.
        size: height and width of its images in pixels; None: the model's default.
        pretrained: whether timm downloads trained weights.
        options: arguments of the model.

    Raises:
        IrpeError: if the name is unknown, or timm cannot create or run the model.
    """
    if not timm.is_model(name):
        # Compare beginnings: users type short names.
        known = {known[: len(name)]: known for known in reversed(timm.list_models())}
        near = [known[found] for found in get_close_matches(name, known, _SHOWN)]
        near = near or timm.list_models(f"*{name}*")[:_SHOWN]
        hint = f"near it: {', '.join(near)}" if near else "timm.list_models() has all names"
        raise IrpeError(f"there is no model {name!r}; {hint}")
    given = dict(options or {}) | ({} if size is None else {"img_size": size})
    try:
        model: Any = timm.create_model(name, pretrained=pretrained, **given).eval()
        if size is not None:  # many models check the size in the forward pass only
            with torch.no_grad():
                model(torch.zeros(1, input_size(model)[0], *size))
        return model
    except IrpeError:
        raise
    except Exception as error:  # timm and its downloads raise many exceptions
        what = f"{name!r} at {size[0]}x{size[1]} pixels" if size else f"{name!r}"
        why = f"{type(error).__name__}: {error}"
        raise IrpeError(f"timm cannot create or run {what}: {why:.160}") from error


def opened(path: str, size: tuple[int, int] | None = None) -> tuple[str, Any]:
    """Build the model of a file and load its weights and encodings.

    Args:
        path: a file of ``irpe.save`` or ``train_cls.py``, or the folder of a run or of timm's
            ``save_for_hf``.
        size: height and width of its images in pixels; None: the size in the file.

    Returns:
        The name of the architecture, and the model.

    Raises:
        IrpeError: if the file does not contain the architecture.
    """
    config = read_json(read_checkpoint(path).about.get("irpe_model", ""))
    if not isinstance(config, dict) or "architecture" not in config:
        raise IrpeError(
            f"{path!r} does not contain the architecture of its model: give a timm model name, "
            "and the file with --checkpoint"
        )
    given = dict(config.get("model_args") or {}, pretrained_cfg=config.get("pretrained_cfg"))
    model = create(config["architecture"], size, options=given)
    files.load(model, path, differ=() if size is None else "positions")
    return config["architecture"], model


def input_size(model: Any) -> tuple[int, int, int]:
    """Return channels, height and width of a model's images."""
    size = timm.data.resolve_model_data_config(model)["input_size"]
    return (getattr(model, "in_chans", size[0]), *size[1:])


def attached_spec(name: str) -> str | None:
    """Return the encoding of a published name; None for other timm models."""
    return zoo.SPECS.get(name.split(".")[0].replace("_distilled_patch16", "_patch16"))


def attach_named(model: nn.Module, name: str, spec: str | Spec) -> None:
    """Attach an encoding, unless a published name has one already."""
    own = attached_spec(name)
    if own is not None:
        raise IrpeError(f"{name} has {own} already: leave --rpe out, or use timm's plain DeiT")
    attach(model, spec)


def load(model: nn.Module, path: str, size: tuple[int, int] | None) -> None:
    """Load a checkpoint without its classifier, which does not affect attention."""
    try:
        files.load(model, path, differ="head" if size is None else "head, positions")
    except IrpeError as error:
        raise IrpeError(
            f"{error}; --rpe, --size, --model-kwargs and the model's name must fit the file"
        ) from error


def prepared(model: Any, picture: Any, size: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Return a PIL image as a model's input, and as an image to show.

    Args:
        model: the model.
        picture: the image.
        size: height and width in pixels; None: the model's default.

    Returns:
        The input ``[1, C, height, width]``, and an image ``[height, width, C]`` in [0, 1].
    """
    settings = timm.data.resolve_model_data_config(model)
    channels, *own = input_size(model)
    settings["input_size"] = (channels, *(size or own))
    for name in ("mean", "std"):  # timm's have three channels; grey images use their mean
        if len(settings[name]) != channels:
            settings[name] = (sum(settings[name]) / len(settings[name]),) * channels
    if channels == 1:
        picture = picture.convert("L")
    image = timm.data.create_transform(**settings, is_training=False)(picture)
    mean, std = (torch.tensor(settings[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return image.unsqueeze(0), (image * std + mean).clamp(0, 1).permute(1, 2, 0)
