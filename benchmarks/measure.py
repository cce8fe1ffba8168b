"""Interleaved timing, bootstrap intervals, peak memory: what the benchmarks share."""

import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
CONTROL = "plain again"


def interleaved(
    cells: dict[str, Callable[[], object]], rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of every cell in every round; each round has an order of its own, by fixed seed."""
    order = random.Random(0)
    for _ in range(warmup):
        for run in cells.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in cells}
    for _ in range(rounds):
        for name in order.sample(list(cells), len(cells)):
            start = time.perf_counter()
            cells[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return times


def ratio(times: list[float], base: list[float]) -> dict[str, float]:
    """Median of the ratios round by round, with a 95 % bootstrap interval of that median."""
    ratios = [a / b for a, b in zip(times, base, strict=True)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(4000))
    return {
        "median": statistics.median(ratios),
        "low": medians[int(0.025 * len(medians))],
        "high": medians[int(0.975 * len(medians))],
    }


def peak_above(before: int) -> float:
    """MiB of the process's peak resident memory above ``before`` (from ``resident``)."""
    # Not getrusage: its maximum is inherited from the process that started this one.
    return (_status("VmHWM") - before) / 1024


def resident() -> int:
    """Resident memory of this process now, in KiB."""
    return _status("VmRSS")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}: memory is measured on Linux only")


def machine() -> dict[str, Any]:
    """What a figure needs beside it: processor, threads, versions."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    facts = {
        "processor": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def save(name: str, figures: dict[str, Any]) -> Path:
    """Write figures as JSON into benchmarks/results/."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n")
    return path
