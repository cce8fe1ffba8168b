"""``irpe cost``: what an encoding adds to a model, counted and not timed."""

import argparse
from typing import Any

import torch

from ...errors import IrpeError
from ...hosts import detach
from ...spec import parse
from ..complexity import activations, multiply_adds, parameters
from ..models import create, equip, equipped_spec
from ..terminal import table

_MIB = 4 / 2**20  # of float32


def run(given: argparse.Namespace) -> None:
    """Print the table."""
    chosen = given.rpe or equipped_spec(given.model)
    if chosen is None:
        raise IrpeError(f"{given.model} brings no encoding along: say one, as --rpe rope-axial")
    spec = parse(chosen)
    model = create(given.model, given.size)
    if given.rpe is not None:
        equip(model, given.model, spec)
    height, width = given.size or model.pretrained_cfg["input_size"][1:]
    image = torch.zeros(1, model.pretrained_cfg["input_size"][0], height, width)
    after = _counted(model, image)
    detach(model)
    before = _counted(model, image)
    rows: list[tuple[str, ...]] = [("", "plain", "with it", "added", "%")]
    for (name, form, plain), (_, _, equipped) in zip(before, after, strict=True):
        more = equipped - plain
        share = f"{100 * more / plain:.2f}"
        rows.append((name, *(f"{n:{form}}" for n in (plain, equipped, more)), share))
    print(f"{given.model}, one image of {height}x{width} pixels")
    print(f"plain, and with {spec}\n")
    print("\n".join(table(rows)))
    print("\nCounted by fvcore. Activations: what products and convolutions give out in a")
    print("forward pass, attention with its logits; a fused kernel keeps less.")


def _counted(model: Any, image: torch.Tensor) -> list[tuple[str, str, float]]:
    weights = parameters(model)
    return [
        ("parameters", ",", weights),
        ("multiply-adds, M", ",.1f", multiply_adds(model, image) / 1e6),
        ("weights, MiB of float32", ",.2f", weights * _MIB),
        ("activations, MiB of float32", ",.2f", activations(model, image) * _MIB),
    ]
