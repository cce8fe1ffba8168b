"""``irpe tables``: the learned tables of a checkpoint, over offsets."""

import argparse

from ...errors import IrpeError
from ..pictures import save
from ..tables import MEETS, draw_tables, read_tables, trained_grid
from ..terminal import table
from ..weights import read_checkpoint


def run(given: argparse.Namespace) -> None:
    """Print a line for each layer, and draw all maps if a file is named."""
    held = read_checkpoint(given.checkpoint)
    spec = given.rpe or held.spec
    if spec is None:
        raise IrpeError(
            f"{given.checkpoint!r} does not say its encoding: say it, as "
            "--rpe rpe-1.9-product-ctx-1-k"
        )
    height, width = given.grid or trained_grid(held.weights) or (14, 14)
    found = read_tables(held.weights, spec, (height, width))
    print(f"{given.checkpoint}: {spec}, offsets of a grid of {height}x{width}")
    for kind in found:
        print(f"\n{kind.kind}, {MEETS[kind.kind]}: {kind.what}")
        rows: list[tuple[object, ...]] = [
            ("layer", "head", "at 0,0", "mean", "least", "most", "most at row,col")
        ]
        for layer, value in zip(kind.layers, kind.values, strict=True):
            for head, one in enumerate(value):
                y, x = divmod(int(one.argmax()), one.shape[1])
                numbers = (one[height - 1, width - 1], one.mean(), one.min(), one.max())
                name = str(head + 1) if len(value) > 1 else "all"
                place = f"{y - height + 1:+d},{x - width + 1:+d}"
                rows.append((layer, name, *(f"{float(n):.4f}" for n in numbers), place))
        print("\n".join(table(rows, left=0)))
    print("\nOffsets are the key's row,column minus the query's, in patches.")
    if given.out:
        save(draw_tables(found, f"{given.checkpoint}\n{spec}"), given.out)
