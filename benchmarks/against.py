"""Attention of this checkout over that of another one, call by call, on a CPU.

    git worktree add /tmp/old v0.1 && python benchmarks/against.py /tmp/old
    python benchmarks/against.py /tmp/old --only "1025 k" --rounds 15

One process for each checkout; they take turns, and the seconds are the processor's, in one thread.
Prints the median of the ratios with its 95 % interval, and exits 1 where one is above 1.05 by its
whole interval. Nothing is written.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import irpe

ROOT = Path(__file__).parents[1]
BAR = 1.05
LEAST = 0.05  # seconds of a measurement: shorter calls are repeated
MODES = {"bias": "bias-0-k", "k": "ctx-1-k", "qk": "ctx-1-qk", "qkv": "ctx-1-qkv"}
# Name: grid or tokens, prefix, heads, head dim, batch.
SHAPES = {
    "197": ((14, 14), 1, 6, 64, 10), "577": ((24, 24), 1, 6, 64, 4),
    "1025": ((32, 32), 1, 6, 64, 2), "1764": ((42, 42), 0, 6, 64, 1),
    "25x34": ((25, 34), 0, 8, 32, 2), "32x42": ((32, 42), 0, 8, 32, 2),
    "42x42": ((42, 42), 0, 8, 32, 2), "8x8": ((8, 8), 0, 4, 32, 16),
}  # fmt: skip
DETR = ("25x34", "32x42", "42x42", "8x8")  # with and without padded keys
TEXTS = ("rope", "alibi", "t5", "shaw,clip=64", "huang4,clip=64")
CELLS = {f"{shape} {mode}": (shape, f"rpe-1.9-product-{MODES[mode]}")
         for shape in SHAPES for mode in MODES}  # fmt: skip
CELLS |= {f"{shape} padded {mode}": (shape, f"rpe-2.0-product-{MODES[mode]}")
          for shape in DETR for mode in MODES}  # fmt: skip
CELLS |= {f"{length} {spec}": (length, spec) for length in (512, 1024) for spec in TEXTS}


def call(cell: str, train: bool) -> Callable[[], object]:
    """Return the call of a cell: forward, or forward + backward."""
    torch.manual_seed(0)
    where, spec = CELLS[cell]
    if isinstance(where, int):
        geometry: irpe.Geometry = irpe.Sequence(where)
        prefix, heads, dim, batch, length = 0, 8, 64, 2, where
    else:
        sides, prefix, heads, dim, batch = SHAPES[where]
        geometry, length = irpe.Grid(*sides, prefix=prefix), prefix + sides[0] * sides[1]
    causal = isinstance(where, int)
    made = irpe.build(
        spec, dim=heads * dim, num_heads=heads, head_dim=dim, prefix=prefix, causal=causal
    )
    for module in made.values():
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    qkv = torch.randn(batch, length, 3, heads, dim).permute(2, 0, 3, 1, 4)
    q, k, v = (x.requires_grad_(train) for x in qkv.unbind(0))
    mask = None
    if "padded" in cell:  # every second image has a quarter of padding, below and at the right
        seen = torch.ones(batch, *sides, dtype=torch.bool)
        seen[1::2, int(sides[0] * 0.866) :], seen[1::2, :, int(sides[1] * 0.866) :] = False, False
        mask = seen.flatten(1)[:, None, None]
    grad = torch.randn(batch, length, heads, dim).transpose(1, 2)

    def run() -> None:
        with torch.set_grad_enabled(train):
            x, y, terms = q, k, ()
            for module in made.values():
                x, y = module.transform(x, y, geometry)
                terms += module.terms(geometry)
            out = irpe.attention(x, y, v, terms, mask=mask, is_causal=causal)
            if train:
                out.backward(grad)

    return run


def serve() -> None:
    """Time what each line of stdin names, and print the seconds."""
    torch.set_num_threads(1)
    runs: dict[str, Callable[[], object]] = {}
    times = 1
    for line in sys.stdin:
        cell, kind = line.rstrip("\n").split("\t")
        if line not in runs:
            runs = {line: call(cell, kind == "training")}
            runs[line]()
            start = time.process_time()
            runs[line]()
            times = 1 + int(LEAST / (time.process_time() - start))
        start = time.process_time()
        for _ in range(times):
            runs[line]()
        print((time.process_time() - start) / times, flush=True)


class Server:
    """A process that times calls of one checkout."""

    def __init__(self, root: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=environment, cwd=root,
        )  # fmt: skip

    def time(self, cell: str, kind: str) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(cell, kind, sep="\t", file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, nargs="?", help="folder of the other checkout")
    parser.add_argument("--only", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve()
        return
    if given.other is None or not (given.other / "irpe").is_dir():
        parser.error("name the folder of another checkout")
    from measure import ratio

    own, other = Server(ROOT), Server(given.other.resolve())
    slower = []
    print(f"{'':22}{'kind':10}{'other, s':>10}{'this, s':>10}{'over':>7}   95 % interval")
    for cell in given.only:
        for kind in ("forward", "training"):
            times: dict[Server, list[float]] = {own: [], other: []}
            for n in range(given.rounds + 1):
                for server in (own, other) if n % 2 else (other, own):
                    times[server].append(server.time(cell, kind))
            mine, theirs = times[own][1:], times[other][1:]
            r = ratio(mine, theirs)
            spread = f"{r['low']:.2f} to {r['high']:.2f}"
            print(
                f"{cell:22}{kind:10}{sorted(theirs)[len(theirs) // 2]:10.4f}"
                f"{sorted(mine)[len(mine) // 2]:10.4f}{r['median']:7.2f}   {spread}",
                flush=True,
            )
            if r["low"] > BAR:
                slower.append(f"{cell}, {kind}")
    if slower:
        sys.exit(f"slower: {'; '.join(slower)}")


if __name__ == "__main__":
    main()
