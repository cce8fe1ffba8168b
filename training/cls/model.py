"""Build the classifier: a timm model, with or without relative position encoding."""

from __future__ import annotations

import difflib
from typing import Any

import timm
from timm.data import resolve_data_config
from torch import nn

import irpe
import irpe.zoo  # registers the published iRPE names with timm
from training.cls.options import ClsConfig
from training.errors import UserError


def check_name(name: str) -> None:
    """Raise :class:`UserError` with the nearest names unless timm knows ``name``."""
    if ":" in name:  # a scheme, such as hf-hub:..., is looked up elsewhere
        return
    base, _, tag = name.partition(".")
    if timm.is_model(base):
        tags = [model.partition(".")[2] for model in timm.list_pretrained(f"{base}.*")]
        if not tag or tag in tags:
            return
        there = f"there are: {', '.join(tags)}" if tags else "it has no published weights"
        raise UserError(f"model.name: {base!r} has no weights {tag!r}; {there}")
    near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.5)
    hint = f"; did you mean {', '.join(near)}?" if near else "; `timm.list_models()` lists them"
    raise UserError(f"model.name: timm has no model {name!r}{hint}")


def build_model(config: ClsConfig, num_classes: int) -> nn.Module:
    """Create the model that ``config`` describes and attach its encoding.

    Raises :class:`UserError` for an unknown name or an argument that the model does not take, and
    ``irpe.IrpeError`` for an encoding that is malformed or that fits no part of the model.
    """
    check_name(config.model.name)
    spec = irpe.parse(config.rpe) if config.rpe is not None else None
    options: dict[str, Any] = {"num_classes": num_classes, "in_chans": config.model.in_chans}
    if config.model.img_size is not None:
        options["img_size"] = config.model.img_size
    if config.model.drop:
        options["drop_rate"] = config.model.drop
    if config.model.drop_path:
        options["drop_path_rate"] = config.model.drop_path
    model = _create(config, {**options, **config.model.kwargs})
    if spec is not None:
        irpe.attach(model, spec, where=config.rpe_where, backend=config.rpe_backend)
    if config.model.grad_checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise UserError(f"model.grad_checkpointing: {config.model.name!r} does not support it")
        model.set_grad_checkpointing(True)
    return model


def _create(config: ClsConfig, options: dict[str, Any]) -> nn.Module:
    name, pretrained = config.model.name, config.model.pretrained
    # For other sizes timm resizes absolute embeddings, each time from the trained ones.
    dynamic = {} if config.sizes is None else {"dynamic_img_size": True}
    try:
        try:
            return timm.create_model(name, pretrained, **{**dynamic, **options})
        except TypeError:  # a convolutional network takes any size as it is
            if not dynamic:
                raise
            return timm.create_model(name, pretrained, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError) as error:
        raise UserError(f"model {name!r} cannot be built with {options}: {error}") from error


def input_settings(config: ClsConfig, model: nn.Module) -> dict[str, Any]:
    """Return ``input_size``, ``mean``, ``std``, ``interpolation`` and ``crop_pct`` for the model.

    What the config leaves open comes from the model's own pretrained configuration.
    """
    data, channels = config.data, config.model.in_chans
    given: dict[str, Any] = {
        "img_size": config.model.img_size or config.model.kwargs.get("img_size"),
        "mean": data.mean,
        "std": data.std,
        "interpolation": data.interpolation,
        "crop_pct": data.crop_pct,
    }
    for name in ("mean", "std"):
        if given[name] is not None and len(given[name]) != channels:
            raise UserError(
                f"data.{name}: {given[name]} has {len(given[name])} values, "
                f"but model.in_chans is {channels}"
            )
    if channels != 3 and data.mean is None:
        # timm's own figures are for three channels; a grey image takes their average.
        given["mean"], given["std"] = [0.45] * channels, [0.225] * channels
    if given["img_size"] is not None:
        size = given.pop("img_size")
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        given["input_size"] = (channels, height, width)
    settings = resolve_data_config(
        {key: value for key, value in given.items() if value is not None}, model=model
    )
    settings["input_size"] = (channels, *settings["input_size"][1:])
    for name in ("mean", "std"):  # timm repeats a single value for the channels it expects
        settings[name] = settings[name][:channels]
    return settings
