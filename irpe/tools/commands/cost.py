"""``irpe cost``: parameters and multiply-adds that an encoding adds to a model."""

import argparse
from typing import Any

import torch

from ...encodings import parse
from ...errors import IrpeError
from ...hosts import attach, detach
from ...spec import Spec
from ..complexity import activations, multiply_adds, parameters
from ..models import attach_named, attached_spec, create, input_size
from ..terminal import table

_MIB = 4 / 2**20  # of float32


def run(given: argparse.Namespace) -> None:
    """Print the table."""
    model = create(given.model, given.size, options=dict(given.model_kwargs))
    chosen = given.rpe or attached_spec(given.model)
    if chosen is None:
        raise IrpeError(f"{given.model} has no encoding: give one, as --rpe rope-axial")
    spec = parse(chosen)
    if given.rpe is not None:
        attach_named(model, given.model, spec)
    channels, *own = input_size(model)
    height, width = given.size or own
    image = torch.zeros(1, channels, height, width)
    after = _counted(model, image)
    detach(model)
    before = _counted(model, image)
    rows: list[tuple[str, ...]] = [("", "plain", "with it", "added", "%")]
    for (name, form, plain), (_, _, encoded) in zip(before, after, strict=True):
        more = encoded - plain
        share = f"{100 * more / plain:.2f}"
        rows.append((name, *(f"{n:{form}}" for n in (plain, encoded, more)), share))
    print(f"{given.model}, one image of {height}x{width} pixels")
    print(f"plain, and with {spec}\n")
    print("\n".join(table(rows)))
    uncounted = _uncounted(model, spec, image, multiply_adds(model, image))
    if uncounted:
        print(f"\nThe multiply-adds of {', '.join(uncounted)} are not counted: fvcore ignores")
        print("element-wise products, sums and gathers.")
    print("\nCounted by fvcore. Activations: outputs of products and convolutions in a")
    print("forward pass, with the logits of attention; fused kernels store fewer.")


def _uncounted(model: Any, spec: Spec, image: torch.Tensor, plain: int) -> list[str]:
    """Return the parts of a spec whose multiply-adds are not counted."""
    found = []
    for part in spec.parts:
        attach(model, part)
        if multiply_adds(model, image) == plain:
            found.append(str(part))
        detach(model)
    return found


def _counted(model: Any, image: torch.Tensor) -> list[tuple[str, str, float]]:
    weights = parameters(model)
    return [
        ("parameters", ",", weights),
        ("multiply-adds, M", ",.1f", multiply_adds(model, image) / 1e6),
        ("weights, MiB of float32", ",.2f", weights * _MIB),
        ("activations, MiB of float32", ",.2f", activations(model, image) * _MIB),
    ]
