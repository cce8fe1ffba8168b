"""12 layers that make an ``irpe.Grid(14, 14, prefix=1)`` each, over layers that share one.

    python benchmarks/grids.py --name grids_cpu      # prints, and writes results/grids_cpu.json

``irpe.RPEAttention(384, 6, ...)``: the forward pass of one image, and forward + backward of four.
Seconds are those of the processor, in one thread, which other processes disturb less.
"""

import argparse
import sys
import time
from collections.abc import Callable

import torch
from measure import CONTROL, compared, interleaved, machine, quiet, save, table

import irpe

SPEC = "rpe-1.9-product-ctx-1-k"
BAR = 1.05


def processor(run: Callable[[], object]) -> float:
    """Seconds of the processor that a call takes."""
    start = time.process_time()
    run()
    return time.process_time() - start


def cells(dim: int, batch: int, train: bool) -> dict[str, Callable[[], object]]:
    """A step with one shared grid ("plain"), and one with a new grid in every layer."""
    torch.manual_seed(0)
    layers = [irpe.RPEAttention(dim, 6, SPEC, prefix=1) for _ in range(12)]
    x, shared = torch.randn(batch, 197, dim), irpe.Grid(14, 14, prefix=1)

    def step(grid: Callable[[], irpe.Grid]) -> None:
        with torch.set_grad_enabled(train):
            y = x
            for layer in layers:
                y = layer(y, grid())
            if train:
                y.sum().backward()

    def same() -> None:
        step(lambda: shared)

    return {"plain": same, CONTROL: same, "own": lambda: step(lambda: irpe.Grid(14, 14, prefix=1))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--dim", type=int, default=384, help="channels (default 384)")
    parser.add_argument("--name", help="of the result file; none is written without it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    cases = []
    for batch, train in ((1, False), (4, True)):
        made = cells(given.dim, batch, train)
        rows = compared(interleaved(made, given.rounds, clock=processor), {})
        print(f"batch {batch}, {'forward + backward' if train else 'forward'}; plain: one grid")
        table(rows, {"own": BAR})
        cases.append({"batch": batch, "train": train, "quiet": quiet(rows), "rows": rows})
    if given.name:
        figures = {"command": "python benchmarks/grids.py " + " ".join(sys.argv[1:])}
        figures |= {"machine": machine(), "rounds": given.rounds, "bar": BAR, "cases": cases}
        print(f"wrote {save(given.name, figures)}")


if __name__ == "__main__":
    main()
