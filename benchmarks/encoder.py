"""models.py --encoder: DETR's encoder with an encoding over the same encoder without.

Two images at a time, of which the second has keys that are padding: its last quarter of columns.
Without dropout, since torch's fused attention has none on a CPU.
"""

import argparse
import functools
import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import (
    CONTROL,
    compared,
    difference,
    gpu_peak,
    interleaved,
    machine,
    peak_above,
    quiet,
    reason,
    resident,
    save,
    table,
)
from torch import Tensor, nn
from ways import stepped

import irpe

sys.path.insert(0, str(Path(__file__).parents[1]))  # ahead of this folder, which has a models.py
from models.detr import Transformer

GRIDS = ["25x34", "32x42", "42x42"]
SPECS = {"bias": "rpe-2.0-product-bias-1-k"} | {
    on: f"rpe-2.0-product-ctx-1-{on}" for on in ("k", "qk", "qkv")
}
BARS = {"k": 1.15}  # on a CPU
DIM, HEADS, HIDDEN = 256, 8, 2048


def build(name: str, layers: int, backend: str) -> nn.Module:
    """An encoder by the name of its cell: plain, bias, k, qk or qkv; tables are not zero."""
    torch.manual_seed(0)
    spec = SPECS.get(name)
    net = Transformer(DIM, HEADS, layers, 0, HIDDEN, 0.0, enc_rpe2d=spec, backend=backend).encoder
    for key, parameter in net.named_parameters():
        if "lookup_table" in key:
            nn.init.normal_(parameter, std=0.02)
    return net


def stepper(net: nn.Module, grid: str, device: str, amp: bool) -> Callable[[], Tensor]:
    """Forward + backward on fixed features; returns a weighed sum of what comes out."""
    height, width = map(int, grid.split("x"))
    draws = torch.Generator().manual_seed(0)
    dtype = next(net.parameters()).dtype
    made = [torch.randn(2, height * width, DIM, generator=draws) for _ in range(3)]
    x, pos, weight = (each.to(device, dtype) for each in made)
    seen = torch.ones(2, height, width, dtype=torch.bool, device=device)
    seen[1, :, 3 * width // 4 :] = False
    seen, where = seen.flatten(1), irpe.Grid(height, width)

    def step() -> Tensor:
        net.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            total = (net(x, pos, seen, where) * weight).sum()
        total.backward()
        return total.detach()

    return step


def gate(grid: str, device: str, amp: bool, backend: str) -> str | None:
    """What is wrong with a backend's gradients of two layers; None if nothing.

    They may be twice as far from the reference in float64 as the reference in the same precision:
    a rounding can turn a ReLU on or off.
    """
    low, slack = torch.bfloat16 if amp else torch.float32, 1e-2 if amp else 1e-3
    for name in SPECS:
        truth, plain, found = (
            _gradients(name, grid, device, dtype, which)
            for dtype, which in ((torch.float64, "reference"), (low, "reference"), (low, backend))
        )
        problem = difference(truth, found, plain, slack)
        if problem is not None:
            return f"{name}: {problem}"
    return None


def _gradients(
    name: str, grid: str, device: str, dtype: torch.dtype, backend: str
) -> dict[str, Tensor]:
    net, amp = build(name, 2, backend).to(device), dtype == torch.bfloat16
    stepper(net if amp else net.to(dtype), grid, device, amp)()
    return {key: p.grad.double() for key, p in net.named_parameters() if p.grad is not None}


def memory(name: str, grid: str, arguments: argparse.Namespace) -> float:
    """MiB that an encoder and its step take at their peak, in a process of their own."""
    command = [sys.executable, str(Path(__file__).with_name("models.py")), "--encoder"]
    command += ["--device", "cpu", "--memory-of", name, "--grid", grid]
    command += ["--layers", str(arguments.layers), "--backend", arguments.backend]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak(arguments: argparse.Namespace) -> float:
    before = resident()
    net = build(arguments.memory_of, arguments.layers, arguments.backend)
    step = stepper(net, arguments.grid[0], "cpu", False)
    for _ in range(2):
        step()
    return peak_above(before)


def run(arguments: argparse.Namespace, until: float) -> None:
    """Every grid: gate, then time and memory; on a GPU as many as there is time for."""
    device, amp = arguments.device, arguments.amp
    problem = gate(arguments.grid[0], device, amp, arguments.backend)
    if problem is not None:
        sys.exit(f"error: the gate is red, nothing is timed: {problem}")
    figures: dict[str, Any] = {
        "command": "python benchmarks/models.py " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "layers": arguments.layers,
        "backend": arguments.backend,
        "autocast": "bfloat16" if amp else None,
        "rounds": arguments.rounds,
        "cases": [],
        "left_out": [f"{grid}, {way}" for way in arguments.way for grid in arguments.grid],
    }
    print(figures["machine"])
    longest = 0.0
    for way, grid in itertools.product(arguments.way, arguments.grid):
        start = time.monotonic()
        if device == "cuda" and until - start < longest:
            break
        rows = measured(grid, way, arguments)
        calm = CONTROL in rows and quiet(rows)
        figures["cases"].append({"grid": grid, "way": way, "quiet": calm, "rows": rows})
        figures["left_out"].pop(0)
        about = f"{grid} tokens, {way}, 2 images, second padded"
        print(f"encoder of {arguments.layers} layers, {about}")
        table(rows, BARS if device == "cpu" and not amp else {})
        save(arguments.name, figures)
        longest = max(longest, time.monotonic() - start)
    for text in figures["left_out"]:
        print("no time left:", text)
    print("written to", save(arguments.name, figures).name)


def measured(grid: str, way: str, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The rows of a grid in one way; what cannot run has its reason in its row."""
    device, cells, peaks, cannot = arguments.device, {}, {}, {}
    for name in ("plain", *SPECS):
        try:
            before = torch.cuda.memory_allocated() if device == "cuda" else 0
            net = build(name, arguments.layers, arguments.backend).to(device)
            make = functools.partial(stepper, grid=grid, device=device, amp=arguments.amp)
            step = stepped(way, net, make)
            step()
            if device == "cuda":
                peaks[name] = gpu_peak(step, before)
            elif not arguments.amp:
                peaks[name] = memory(name, grid, arguments)
            cells[name] = step
        except Exception as error:
            if name == "plain" and way == "eager":
                raise
            cannot[name] = {"cannot": reason(error)}
    if "plain" not in cells:
        return cannot
    cells[CONTROL] = cells["plain"]
    return compared(interleaved(cells, arguments.rounds), peaks) | cannot
