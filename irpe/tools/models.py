"""timm's models by name, equipped and with weights: what several subcommands begin with."""

from collections import Counter
from difflib import get_close_matches
from typing import Any

import timm
import timm.data
import torch
from torch import Tensor, nn

from .. import zoo  # registers the published names
from ..errors import IrpeError
from ..hosts import attach
from ..spec import Spec
from .weights import read_weights

_SHOWN = 3


def create(name: str, size: tuple[int, int] | None = None, pretrained: bool = False) -> Any:
    """A model of timm's or a published one, for evaluation.

    Args:
        name: as timm's registry has it. size: height and width of its images in pixels; None:
            the model's own. pretrained: whether timm fetches trained weights.

    Raises:
        IrpeError: for an unknown name, with the nearest ones; a size that the model cannot take;
            weights that cannot be had.
    """
    if not timm.is_model(name):
        # By their beginnings: most names are far longer than what people remember of them.
        known = {known[: len(name)]: known for known in reversed(timm.list_models())}
        near = [known[found] for found in get_close_matches(name, known, _SHOWN)]
        near = near or timm.list_models(f"*{name}*")[:_SHOWN]
        hint = f"near it: {', '.join(near)}" if near else "timm.list_models() has all names"
        raise IrpeError(f"there is no model {name!r}; {hint}")
    options: dict[str, Any] = {} if size is None else {"img_size": size}
    try:
        model: Any = timm.create_model(name, pretrained=pretrained, **options).eval()
        if size is not None:  # what a model cannot take, many say in their forward pass only
            with torch.no_grad():
                model(torch.zeros(1, model.pretrained_cfg["input_size"][0], *size))
        return model
    except IrpeError:
        raise
    except Exception as error:  # timm and its downloads report in any way they like
        what = f"{name!r} at {size[0]}x{size[1]} pixels" if size else f"{name!r}"
        why = f"{type(error).__name__}: {error}"
        raise IrpeError(f"timm cannot make or run {what}: {why:.160}") from error


def equipped_spec(name: str) -> str | None:
    """The encoding that a published name brings along; None for timm's own."""
    return zoo.SPECS.get(name.split(".")[0].replace("_distilled_patch16", "_patch16"))


def equip(model: nn.Module, name: str, spec: str | Spec) -> None:
    """Attach an encoding; raises IrpeError where a published name has one already."""
    own = equipped_spec(name)
    if own is not None:
        raise IrpeError(f"{name} carries {own} already: leave --rpe out, or name timm's plain DeiT")
    attach(model, spec)


def load(model: nn.Module, path: str) -> None:
    """Load a checkpoint, all of it.

    Raises:
        IrpeError: for a file that cannot be read, or does not fit the model, with the keys.
    """
    given = {key: tuple(value.shape) for key, value in read_weights(path).items()}
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    wrong = [key for key in {**own, **given} if own.get(key) != given.get(key)]
    if wrong:
        kinds = Counter(
            "missing" if key not in given else "unknown" if key not in own else "of another shape"
            for key in wrong
        )
        counts = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
        raise IrpeError(
            f"checkpoint {path!r} is of another model ({counts}: {', '.join(wrong[:_SHOWN])}, ...);"
            " --rpe, --size and the model's name must be those it was made with"
        )
    model.load_state_dict(read_weights(path))


def prepared(model: Any, picture: Any, size: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """A picture as a model takes it ``[1, C, height, width]``, and that as one to show.

    Args:
        picture: a PIL image. size: height and width in pixels; None: the model's own.

    Returns:
        The input, and ``[height, width, C]`` from 0 to 1.
    """
    settings = timm.data.resolve_model_data_config(model)
    if size is not None:
        settings["input_size"] = (settings["input_size"][0], *size)
    image = timm.data.create_transform(**settings, is_training=False)(picture)
    mean, std = (torch.tensor(settings[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return image.unsqueeze(0), (image * std + mean).clamp(0, 1).permute(1, 2, 0)
