"""Where the time of one layer of attention goes, kernel by kernel: a profile of each mode.

    python benchmarks/layer.py --name /tmp/layer                 # a GPU: L = 197, 850, 4096
    python benchmarks/layer.py --grid 4x4 --batch 1 --device cpu

Forward and backward, bfloat16 (on a CPU float32), with the backend that ``auto`` picks. Writes
after each mode: the kernels with their calls and microseconds a step, the largest first.
"""

import argparse
import sys
from typing import Any

import torch
from contenders import MODES, Case, Inputs
from measure import machine, reason, save, suffix
from torch.profiler import ProfilerActivity, profile

import irpe

GRIDS = {"cuda": ["14x14", "25x34", "64x64"], "cpu": ["14x14"]}
TOKENS = 50_000  # a batch, unless it is given


def case_of(grid: str, batch: int | None, device: str) -> Case:
    height, width = (int(n) for n in grid.split("x"))
    prefix = int(grid == "14x14")
    dim, heads = (32, 8) if grid == "25x34" else (64, 6)
    dtype = "bfloat16" if device == "cuda" else "float32"
    batch = batch or max(1, TOKENS // (height * width))
    return Case(height, width, prefix, dim, heads, batch, dtype, "product")


def kernels(case: Case, mode: str, device: str, steps: int) -> list[dict[str, Any]]:
    """The kernels (on a CPU: operators) of a step, by the time that they take."""
    inputs = Inputs(case, device)
    terms = inputs.terms(mode)
    wanted = [*inputs.qkv, *inputs.tables(mode)]

    def step() -> None:
        out = irpe.attention(*inputs.qkv, terms)
        torch.autograd.grad(out, wanted, inputs.grad)

    for _ in range(3):
        step()
    kind = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[kind]) as found:
        for _ in range(steps):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    time = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    rows = [
        {"name": e.key[:80], "calls": e.count / steps, "us": getattr(e, time) / steps}
        for e in found.key_averages()
        if getattr(e, time) > 0
    ]
    return sorted(rows, key=lambda row: -row["us"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=here)
    parser.add_argument("--grid", nargs="+", help="rows x columns of tokens")
    parser.add_argument("--batch", type=int, help="samples; about 50000 tokens otherwise")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--name", help="name of the result file; layer_<gpu> or layer_cpu")
    arguments = parser.parse_args()
    name = arguments.name or f"layer_{suffix(arguments.device)}"
    command = " ".join(["python benchmarks/layer.py", *sys.argv[1:]])
    figures: dict[str, Any] = {"command": command, "machine": machine(), "cases": []}
    for grid in arguments.grid or GRIDS[arguments.device]:
        case = case_of(grid, arguments.batch, arguments.device)
        for mode in ("", *MODES):
            row: dict[str, Any] = {"case": str(case), "batch": case.batch, "mode": mode or "plain"}
            try:
                row["kernels"] = kernels(case, mode, arguments.device, arguments.steps)
            except Exception as error:
                row["cannot"] = reason(error)
            figures["cases"].append(row)
            save(name, figures)
            total = sum(k["us"] for k in row.get("kernels", ()))
            print(f"{row['case']} batch {case.batch} {row['mode']}: {total:.0f} us a step")
            for kernel in row.get("kernels", ())[:12]:
                print(f"  {kernel['us']:9.1f} us {kernel['calls']:5.1f}x {kernel['name']}")
            if "cannot" in row:
                print("  " + row["cannot"], flush=True)


if __name__ == "__main__":
    main()
