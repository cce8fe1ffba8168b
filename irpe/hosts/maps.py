"""Attention maps of attached modules."""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import IrpeError
from .base import find_sites


def attention_maps(model: nn.Module, images: Tensor, **inputs: Any) -> dict[str, Tensor]:
    """Return the attention probabilities of every module with an encoding attached.

    The model runs once, in evaluation mode and without gradients.

    Args:
        model: one with encodings attached. Call this inside ``irpe.located`` if the model needs it.
        images: the model's first argument.
        inputs: its keyword arguments.

    Returns:
        ``[B, H, L, S]`` by module path; L and S include prefix tokens. Windows count as samples.
        Several calls of a module in one forward pass are concatenated along B.

    Raises:
        IrpeError: if nothing is attached, or no attached module ran.
    """
    calls = record_calls(model, images, **inputs)
    return {name: torch.cat([weights for weights, *_ in made]) for name, made in calls.items()}


def record_calls(model: nn.Module, images: Tensor, **inputs: Any) -> dict[str, list[Any]]:
    """Return (probabilities, transformed queries, keys, terms, scale) of each call, by module path.

    See ``attention_maps``.
    """
    modules = {site.name: site.module for site in find_sites(model) if site.attached}
    if not modules:
        raise IrpeError(f"nothing is attached to this {type(model).__name__}")
    records: dict[str, list[Any]] = {}
    training = {module: module.training for module in model.modules()}
    try:
        for name, module in modules.items():
            records[name] = module.__dict__["rpe_record"] = []
        with torch.no_grad():
            model.eval()(images, **inputs)
    finally:
        for module in modules.values():
            module.__dict__.pop("rpe_record", None)
        for module, mode in training.items():
            module.training = mode
    found = {name: record for name, record in records.items() if record}
    if not found:
        raise IrpeError(f"no attached module of this {type(model).__name__} was called")
    return found
