"""Train, evaluate, keep checkpoints, attach and detach in a loop: does memory grow?

    python benchmarks/soak.py --minutes 30

Each round is a run as of ``train_cls.py`` on digits (two epochs, each with an evaluation and a
checkpoint), then a few steps of a model that lives on, on one of a few grids, with an encoding
attached before and detached after them. Then 1,000 grids go through two models. Printed: the slope
over training steps, with its 95 % interval, of the resident memory and of what the C library has
handed out and not got back (the difference is its free space); and what bucket ids the geometries
alive hold.
"""

import argparse
import contextlib
import ctypes
import gc
import io
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import timm
import torch
from measure import machine, resident, save
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import irpe
from irpe.cache import CACHE
from models.deit import DeiT
from training import config
from training.cls.options import ClsConfig
from training.cls.run import open_task
from training.run import start

SPEC = "rpe-1.9-product-ctx-1-qkv"
RUN = [
    "--model.name=vit_tiny_patch16_224", "--model.img_size=8", "--model.in_chans=1",
    "--model.kwargs={patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}", f"--rpe={SPEC}",
    "--ema.enabled=true", "--data.workers=0", "--epochs=2", "--batch_size=256",
    "--eval_batch_size=360", "--sched.warmup_epochs=0", "--run.progress=none", "--run.device=cpu",
]  # fmt: skip
RUN_STEPS, OWN_STEPS = 2 * (1437 // 256), 3
GRIDS = 4  # of the steps with an encoding attached


@dataclass
class Record:
    """After each round: training steps so far, MiB, and what is alive."""

    steps: list[int] = field(default_factory=list)
    resident: list[float] = field(default_factory=list)
    handed_out: list[float] = field(default_factory=list)
    tensors: list[int] = field(default_factory=list)
    geometries: list[int] = field(default_factory=list)


class Mallinfo(ctypes.Structure):
    """``struct mallinfo2`` of the GNU C library."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd",
            "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def handed_out() -> float:
    """MiB that the C library has handed out; nan where it can't tell (it is not GNU's)."""
    if (ask := getattr(ctypes.CDLL(None), "mallinfo2", None)) is None:
        return math.nan
    ask.restype = Mallinfo
    told = ask()
    return (told.uordblks + told.hblkhd) / 2**20


def alive(kind: type) -> list:
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), kind)]


def bucket_bytes() -> int:
    """Bytes of all that is derived from geometries."""
    return CACHE.used


def sizes(most: int = 40) -> Iterator[tuple[int, int]]:
    """Grids, each once, small and large ones by turns."""
    pairs = [(h, w) for h in range(1, most + 1) for w in range(1, most + 1)]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    return (pairs[i] for i in order)


def model_of_any_grid() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=16, depth=2, num_heads=2,
        num_classes=10, dynamic_img_size=True,
    )  # fmt: skip


def one_round(options: ClsConfig, model: nn.Module, grid: tuple[int, int], folder: Path) -> int:
    """A run of the script, then steps with an encoding attached; return the steps in all."""
    with tempfile.TemporaryDirectory(dir=folder) as runs, contextlib.redirect_stdout(io.StringIO()):
        start(replace(options, run=replace(options.run, output=runs)), open_task)
    irpe.attach(model, SPEC)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(OWN_STEPS):
        images = torch.randn(2, 3, 4 * grid[0], 4 * grid[1])
        model(images).logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.inference_mode():
        model.eval()(images)
    model.train()
    irpe.detach(model)
    return RUN_STEPS + OWN_STEPS


def soak(seconds: float, folder: Path, rounds: int | None = None) -> Record:
    """Rounds until the time is over, or so many of them."""
    record, model, steps = Record(), model_of_any_grid(), 0
    # Once: the parser leaves some types behind each time, and a process parses once.
    options = config.parse(ClsConfig, RUN, "train_cls.py")
    end = time.monotonic() + seconds
    # A few grids by turns: for every new size torch keeps its own kernels (oneDNN's cache), which
    # ``many_grids`` shows.
    for number, grid in enumerate(itertools.cycle(itertools.islice(sizes(20), GRIDS))):
        if number == rounds or (rounds is None and time.monotonic() > end):
            return record
        steps += one_round(options, model, grid, folder)
        irpe.clear_cache()  # the next grid's ids are other ones
        record.tensors.append(len(alive(Tensor)))
        record.geometries.append(len(alive(irpe.Geometry)))
        record.steps.append(steps)
        record.resident.append(resident() / 1024)
        record.handed_out.append(handed_out())
    raise AssertionError("a cycle has no end")


def many_grids(count: int, most: int = 40) -> tuple[list[int], list[int]]:
    """Grids through two models: geometries alive and bytes of their bucket ids after each 25."""
    attached, written = model_of_any_grid(), DeiT(32, 4, 16, 2, 2, num_classes=10, rpe=SPEC)
    irpe.attach(attached, SPEC)
    geometries, held = [], []
    with torch.no_grad():
        for number, (height, width) in enumerate(itertools.islice(sizes(most), count), start=1):
            image = torch.zeros(1, 3, 4 * height, 4 * width)
            attached(image), written(image)
            if number % 25 == 0 or number == count:
                geometries.append(len(alive(irpe.Geometry)))
                held.append(bucket_bytes())
    return geometries, held


def slope(x: list[int], y: list[float]) -> tuple[float, float]:
    """Least squares: y per 1,000 x, and half of its 95 % interval."""
    n, mean_x, mean_y = len(x), sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    rise = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    rest = sum((b - mean_y - rise * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    return 1000 * rise, 1000 * 1.96 * math.sqrt(rest / max(n - 2, 1) / spread)


def growth(steps: list[int], memory: list[float]) -> dict[str, float]:
    """First and last MiB, and the slope per 1,000 steps with the ends of its 95 % interval."""
    rise, half = slope(steps, memory)
    return {
        "from": memory[0], "to": memory[-1], "rise": rise, "low": rise - half, "high": rise + half
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--grids", type=int, default=1000)
    parser.add_argument("--name", help="of the result file: soak writes results/soak_cpu.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record = soak(60 * options.minutes, Path(folder))
    # What is made once (caches of kernels, the allocator's arenas) is over by then.
    first = len(record.steps) // 3
    if len(record.steps) - first < 3:
        parser.error(f"--minutes {options.minutes:g} is too short: {len(record.steps)} rounds")
    figures = {
        "command": f"python benchmarks/soak.py --minutes {options.minutes:g}",
        "machine": machine(), "rounds": len(record.steps), "steps": record.steps[-1],
        "resident": growth(record.steps[first:], record.resident[first:]),
        "handed_out": growth(record.steps[first:], record.handed_out[first:]),
        "tensors": [record.tensors[first], record.tensors[-1]],
        "geometries": [record.geometries[first], record.geometries[-1]],
    }  # fmt: skip
    print(f"{figures['rounds']} rounds, {figures['steps']} training steps; of the last two thirds:")
    for name in ("resident", "handed_out"):
        own = figures[name]
        print(
            f"memory {name.replace('_', ' ')}: {own['from']:.2f} to {own['to']:.2f} MiB, "
            f"{own['rise']:+.3f} MiB per 1,000 steps, 95 % interval {own['low']:+.3f} to "
            f"{own['high']:+.3f} (least squares, rounds taken as independent)"
        )
    for name in ("tensors", "geometries"):
        print("{} alive after a round: {} then, {} now".format(name, *figures[name]))
    before = resident()
    geometries, held = many_grids(options.grids)
    figures["many_grids"] = {
        "count": options.grids, "geometries": max(geometries), "mib": max(held) / 2**20,
        "resident_mib": (resident() - before) / 1024,
    }  # fmt: skip
    print(
        "{count} grids through two models: at most {geometries} geometries alive, {mib:.1f} MiB of "
        "bucket ids, resident memory {resident_mib:+.0f} MiB".format(**figures["many_grids"])
    )
    if options.name:
        print("written to", save(f"{options.name}_cpu", figures))


if __name__ == "__main__":
    main()
