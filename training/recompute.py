"""Activation checkpointing: layers that keep their inputs only, and run again on the way back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(layers: Iterable[nn.Module]) -> None:
    """Let each layer recompute its activations in the backward pass. No name or weight changes."""
    for layer in layers:
        layer.forward = functools.partial(_run, layer.forward)  # type: ignore[method-assign]


def _run(forward: Callable[..., Any], *given: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*given, **named)
    # Not by re-entry, which knows no keyword arguments and no gradients of what layers close over.
    return checkpoint(forward, *given, use_reentrant=False, **named)
