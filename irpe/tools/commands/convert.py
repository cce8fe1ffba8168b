"""``irpe convert``: a torch checkpoint to safetensors, or back."""

import argparse
from pathlib import Path

from ...errors import IrpeError
from ...files.read import TORCH, read_checkpoint, write_checkpoint


def run(given: argparse.Namespace) -> None:
    """Convert a file, and print its contents."""
    source, target = Path(given.source), Path(given.target)
    if target.exists():
        raise IrpeError(f"{given.target!r} exists already: remove it, or give another name")
    if (source.suffix == ".safetensors") == (target.suffix == ".safetensors"):
        raise IrpeError(
            f"nothing to convert from {given.source!r} to {given.target!r}: one name must end in "
            f".safetensors, the other in {' or '.join(TORCH)}"
        )
    held = read_checkpoint(source)
    write_checkpoint(target, held)
    numbers = sum(value.numel() for value in held.weights.values())
    said = f", encoding {held.spec}" if held.spec else ""
    print(f"{given.target}: {len(held.weights)} tensors, {numbers:,} numbers{said}")
