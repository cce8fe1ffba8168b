"""``irpe tables``: the learned tables of a checkpoint, over offsets."""

import argparse

from torch import Tensor

from ...encodings import parse
from ...encodings.rpe import RPE
from ...errors import IrpeError
from ...files.read import Checkpoint, read_checkpoint
from ..pictures import save
from ..tables import PLACES, draw_tables, read_tables, trained_grid
from ..terminal import table


def run(given: argparse.Namespace) -> None:
    """Print a line for each layer; with --out, draw all maps."""
    held = read_checkpoint(given.checkpoint)
    by_spec = {given.rpe: held.weights} if given.rpe else _by_spec(held)
    if not by_spec:
        raise IrpeError(
            f"{given.checkpoint!r} does not contain its spec: give it, as "
            "--rpe rpe-1.9-product-ctx-1-k"
        )
    height, width = given.grid or trained_grid(held.weights) or (14, 14)
    found = [
        kind
        for spec, weights in by_spec.items()
        for kind in read_tables(weights, spec, (height, width))
    ]
    title = ", ".join(map(str, by_spec))
    print(f"{given.checkpoint}: {title}, offsets of a grid of {height}x{width}")
    for kind in found:
        print(f"\n{kind.kind}, {PLACES[kind.kind]}: {kind.what}")
        rows: list[tuple[object, ...]] = [
            ("layer", "head", "at 0,0", "mean", "least", "most", "most at row,col", "unused")
        ]
        for layer, value in zip(kind.layers, kind.values, strict=True):
            for head, one in enumerate(value):
                y, x = divmod(int(one.argmax()), one.shape[1])
                numbers = (one[height - 1, width - 1], one.mean(), one.min(), one.max())
                name = str(head + 1) if len(value) > 1 else "all"
                place = f"{y - height + 1:+d},{x - width + 1:+d}"
                unused = f"{int((one == 0).sum())} of {one.numel()}"
                rows.append((layer, name, *(f"{float(n):.4f}" for n in numbers), place, unused))
        print("\n".join(table(rows, left=0)))
    print("\nOffsets are the key's row,column minus the query's, in patches. Unused: offsets whose")
    print("bucket is exactly 0, its initial value: training did not use it.")
    if given.out:
        save(draw_tables(found, f"{given.checkpoint}\n{title}"), given.out)


def _by_spec(held: Checkpoint) -> dict[str, dict[str, Tensor]]:
    """Return the image encodings of a file, each with the weights of its attention modules."""
    if not held.specs:
        return {} if held.spec is None else {held.spec: held.weights}
    found: dict[str, dict[str, Tensor]] = {}
    for path, text in held.specs.items():
        inside = f"{path}." if path else ""
        for part in parse(text).parts:
            if isinstance(part, RPE):
                weights = found.setdefault(str(part), {})
                weights.update({n: v for n, v in held.weights.items() if n.startswith(inside)})
    if not found:
        several = ", ".join(sorted(set(held.specs.values())))
        raise IrpeError(
            f"the file's encodings are {several}: none is an image encoding with tables"
        )
    return found
