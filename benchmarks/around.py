"""What surrounds the kernels of one layer of attention, without a GPU: launches, bytes, Python.

    python benchmarks/around.py                 # k, qk, qkv: counters beside their bars
    python benchmarks/around.py --host          # host time too, a minute on an idle machine
    python benchmarks/around.py --arch 90 120   # registers and spills too, by compilation
    python benchmarks/around.py --grid 25x34 --dim 32

One forward and one backward pass, bfloat16 autocast, float32 tables. Exit code 1 where a bar is
missed.

- launches: kernels of Triton, and operators of torch that start one.
- traffic: bytes that kernels and operators read and write, counted from the shapes of their
  tensors without reuse in a cache, less those of plain attention in the same two passes; in units
  of one ``[B, H, L, D]`` tensor of bfloat16. Programs reuse their scratch and add to their shares
  of the gradients of tables: where the memory of all of them is below 16 MB it counts zero.
- host: time over a dispatch of torch's ``scaled_dot_product_attention`` in the same run, both in
  one thread and under autocast, with a launcher that returns at once (stub.py).
- spills: bytes, of the kernels that are launched.
"""

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "0")

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import irpe
from irpe.backends import triton as backend
from irpe.backends.triton import launch, ops

MODES = ("k", "qk", "qkv")
LAUNCHES = {"k": 6, "qk": 8, "qkv": 9}
# Tensors beyond plain attention: a * r + b, where r = W / D.
TRAFFIC = {"k": (3, 2), "qk": (7, 3), "qkv": (9, 5)}
HOST = {"k": 4.0, "qk": 6.0, "qkv": 6.0}
SCRATCH = 16e6
WIDTH = 64  # W: 8 column buckets, 8 row buckets with that of prefix tokens
FRESH = {"empty", "new_empty", "empty_like", "empty_strided"}  # memory as it is: no kernel
FILLS = {"zero_", "fill_", "copy_"}  # they do not read what they write to


@dataclass
class Counted:
    """What one forward and backward pass does."""

    launches: list[str] = field(default_factory=list)
    kernels: int = 0
    bytes: int = 0
    scratch: int = 0


class Operators(TorchDispatchMode):
    """Counts operators of torch that start a kernel, and the bytes that they read and write."""

    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if func.namespace == "irpe":  # what it does is counted instead
            with self:
                return (ops._backward if name.endswith("_backward") else ops._forward)(*args)
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        written = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        held = {_at(x) for x in read}
        inside = func._schema.is_mutable
        if name in FRESH or (not inside and all(_at(x) in held for x in written)):
            return out  # views start no kernel
        if name in FILLS or (inside and kwargs.get("beta", 1) == 0):
            read = read[1:]
        self.counted.bytes += sum(nbytes(x) for x in (*read, *written))
        self.counted.launches.append(name)
        return out


def _at(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def nbytes(x: torch.Tensor) -> int:
    """Bytes of a tensor's different numbers: expanded axes count once."""
    sizes = (n for n, step in zip(x.shape, x.stride(), strict=True) if step or n == 1)
    total = x.element_size()
    for n in sizes:
        total *= n
    return total


def count(mode: str, grid: tuple[int, int, int], heads: int, dim: int, batch: int) -> Counted:
    """Counts of one layer: launches that would be started and what they read and write."""

    # Bytes by address, of the backward pass and of the forward pass, whose memory is free by then.
    scratch: tuple[dict[int, int], dict[int, int]] = ({}, {})

    def note(step: launch.Step, tensors: dict[str, torch.Tensor | None]) -> None:
        counted.launches.append(step.name)
        counted.kernels += 1
        shares: list[torch.Tensor] = []
        for _, name in step.places:
            x = tensors[name]
            if x is None:
                continue
            if name.startswith("scratch") or "shares" in name:
                if any(x is one for one in shares):
                    continue  # it stands in for a missing one
                shares.append(x)
                held = scratch[step.name in ("forward", "project")]
                held[_at(x)] = x.untyped_storage().nbytes()
                # Shares are written by one kernel and read by another.
                counted.scratch += nbytes(x) * (2 if name.startswith("scratch") else 1)
            else:
                counted.bytes += nbytes(x)

    q, k, v, terms = inputs(mode, grid, heads, dim, batch)
    grad = torch.zeros(batch, q.shape[2], heads, dim, dtype=q.dtype).transpose(1, 2)
    real = launch.launch, backend.absent, backend.INTERPRETED
    launch.launch, backend.absent, backend.INTERPRETED = note, lambda device: None, False
    counted = Counted()
    wanted = [q, k, v, *(t.table for t in terms)]

    def both() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out = irpe.attention(q, k, v, terms, backend="triton")
        torch.autograd.grad(out, wanted, grad)

    try:
        both()  # plans
        both()
        counted = Counted()
        for held in scratch:
            held.clear()
        with Operators(counted):
            both()
    finally:
        launch.launch, backend.absent, backend.INTERPRETED = real
    if max(sum(held.values()) for held in scratch) >= SCRATCH:
        counted.bytes += counted.scratch
    return counted


def inputs(
    mode: str, grid: tuple[int, int, int], heads: int, dim: int, batch: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[irpe.Term, ...]]:
    """q, k and v as one projection leaves them, and terms with float32 tables."""
    where = irpe.Grid(*grid)
    length = where.query_length
    x = torch.zeros(3, batch, length, heads, dim, dtype=torch.bfloat16)
    q, k, v = (y.transpose(1, 2).requires_grad_() for y in x.unbind(0))
    spec = f"rpe-1.9-product-ctx-1-{mode}"
    modules = irpe.build_rpe(spec, head_dim=dim, num_heads=heads, prefix=grid[2])
    return q, k, v, sum((m.terms(where) for m in modules if m is not None), ())


def traffic(
    counted: Counted, grid: tuple[int, int, int], heads: int, dim: int, batch: int
) -> float:
    """Tensors ``[B, H, L, D]`` of bfloat16 beyond those of plain attention in two passes.

    Plain: forward reads q, k, v and writes out; the row pass reads these, grad and out, and writes
    one; the column pass reads q, k, v, grad and writes two: 16 in all, and the logarithms.
    """
    tokens = batch * heads * irpe.Grid(*grid).query_length
    plain = 16 * tokens * dim * 2
    # The largest logit and the sum, written once and read twice; delta, written and read.
    plain += tokens * 4 * (2 * 3 + 2)
    return (counted.bytes - plain) / (tokens * dim * 2)


def host(mode: str, rounds: int = 150) -> float:
    """Host time of a call over a dispatch of torch's attention, forward and backward."""
    from irpe.backends.triton import strips

    strips.WASTE = float("inf")
    q, k, v, terms = inputs(mode, (2, 2, 0), 1, 16, 1)
    grad = torch.zeros_like(q)
    wanted = [q, k, v, *(t.table for t in terms)]

    # With more threads a CPU's attention wakes them up, which is no time of a dispatch.
    torch.set_num_threads(1)

    def plain() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), [q, k, v], grad)

    def ours() -> None:
        out = irpe.attention(q, k, v, terms, backend="triton")
        torch.autograd.grad(out, wanted, grad)

    with torch.autocast("cpu", torch.bfloat16):
        base, found = interleaved([plain, ours], rounds)
    return found / base


def interleaved(cells: list[Callable[[], None]], rounds: int) -> list[float]:
    """Seconds of each cell at its 10th percentile, in turns, so that load hits all alike."""
    times: list[list[float]] = [[] for _ in cells]
    for run in cells:
        for _ in range(30):
            run()
    gc.disable()
    try:
        for _ in range(rounds):
            for run, own in zip(cells, times, strict=True):
                for _ in range(3):
                    start = time.perf_counter()
                    run()
                    own.append(time.perf_counter() - start)
    finally:
        gc.enable()
    return [sorted(own)[len(own) // 10] for own in times]


def spills(mode: str, arch: int, dim: int) -> tuple[int, int]:
    """The most registers, and the bytes of spills, of the kernels of a mode."""
    from variants import launches, measure

    found = [
        measure(kernel, given, arch)
        for _, kernel, given in launches(mode, torch.bfloat16, dim, arch)
    ]
    return max(f["registers"] for f in found), sum(f["spills"] for f in found)


def rows(arguments: argparse.Namespace) -> list[tuple[str, str, float, float]]:
    """(mode, what, found, bar) of everything that is counted."""
    height, columns = (int(n) for n in arguments.grid.split("x"))
    shape = ((height, columns, arguments.prefix), arguments.heads, arguments.dim, arguments.batch)
    found = []
    for mode in arguments.modes:
        counted = count(mode, *shape)
        found.append((mode, "launches", len(counted.launches), LAUNCHES[mode]))
        a, b = TRAFFIC[mode]
        bar = a * WIDTH / arguments.dim + b
        found.append((mode, "traffic", traffic(counted, *shape), bar))
        if arguments.verbose:
            print(mode, " ".join(counted.launches))
    if arguments.host:
        from stub import Stub

        Stub(90).install()
        found += [(mode, "host", host(mode), HOST[mode]) for mode in arguments.modes]
    for arch in arguments.arch:
        for mode in arguments.modes:
            registers, spilled = spills(mode, arch, arguments.dim)
            found.append((mode, f"registers sm_{arch}", registers, 255))
            found.append((mode, f"spills sm_{arch}", spilled, 0))
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--grid", default="14x14", help="rows x columns of patches")
    parser.add_argument("--prefix", type=int, default=1, help="prefix tokens")
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--dim", type=int, default=64, help="of a head")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--host", action="store_true", help="measure host time")
    parser.add_argument("--arch", type=int, nargs="*", default=[], help="compile, such as 90")
    parser.add_argument("--verbose", action="store_true", help="name the launches")
    found = rows(parser.parse_args(argv))
    print(f"{'mode':6}{'':18}{'found':>9}{'bar':>7}")
    for mode, what, value, bar in found:
        said = "" if value <= bar else "missed"
        print(f"{mode:6}{what:18}{value:9.1f}{bar:7.1f}  {said}")
    if any(value > bar for *_, value, bar in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
