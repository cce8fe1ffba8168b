"""``irpe explain``: the backend that ``auto`` selects, also for a device that is not present."""

import argparse
import textwrap
from dataclasses import replace
from typing import Any

import torch

from ...encodings import build, encodings_of, parse
from ...errors import IrpeError
from ...functional import reasoned, validated
from ...geometry import Geometry, Grid, Sequence
from ..terminal import WIDTH


def run(given: argparse.Namespace) -> None:
    """Print the selected backend and the reasons."""
    batch, heads, length, head_dim = given.shape
    dtype = getattr(torch, given.dtype)
    q = torch.empty(batch, heads, length, head_dim, dtype=dtype, device="meta")
    owner = torch.nn.Module()
    terms: tuple[Any, ...] = ()
    if given.rpe is not None:
        spec = parse(given.rpe)
        geometry = _geometry(given, 2 in spec.axes and 1 not in spec.axes)
        made = build(
            spec, dim=heads * head_dim, num_heads=heads, head_dim=head_dim,
            prefix=given.prefix, causal=given.causal, device="meta", dtype=dtype,
        )  # fmt: skip
        for name, module in made.items():
            setattr(owner, name, module)
        terms = encodings_of(owner).terms(geometry)
    call = validated(q, q, q, terms, None, given.causal, 0.0, None)
    call = replace(call, device=torch.device(given.device), compiled=given.compile)
    for line in reasoned(call).splitlines():
        print(textwrap.fill(line, WIDTH, subsequent_indent="    "))
    if given.device != "cpu" and not torch.cuda.is_available():
        print("There is no such device here: Triton and compute capability 8.0 are assumed.")


def _geometry(given: argparse.Namespace, image: bool) -> Geometry:
    patches = given.shape[2] - given.prefix
    if patches < 1:
        raise IrpeError(
            f"--shape has {given.shape[2]} tokens and --prefix {given.prefix}: no patch is left"
        )
    if given.grid is not None:
        height, width = given.grid
        return Grid(height, width, prefix=given.prefix)
    if not image:
        return Sequence(patches, prefix=given.prefix)
    side = round(patches**0.5)
    if side * side != patches:
        raise IrpeError(
            f"{patches} patches are not a square: give --grid HxW, and --prefix for class tokens"
        )
    return Grid(side, side, prefix=given.prefix)
