"""Interleaved timing, bootstrap intervals, peak memory: what the benchmarks share."""

import importlib
import importlib.util
import json
import math
import platform
import random
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
CONTROL = "plain again"
QUIET = (0.98, 1.02)

Run = Callable[[], object]


def wall(run: Run) -> float:
    """Seconds of a call by the clock on the wall."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Events:
    """Seconds of a call on the GPU, by its events, with nothing of the inputs in the L2 cache.

    Ahead of the call a buffer larger than that cache is overwritten, so often that Python has
    launched the whole call before the GPU comes to it: what is timed is the GPU's work. How long
    Python took at least is kept in ``host``, seconds by call.
    """

    def __init__(self) -> None:
        self.scratch = torch.empty(2**28, dtype=torch.int8, device="cuda")
        self.host: dict[Run, float] = {}
        self.cover = 1e-4
        self.cover = sorted(self(self.scratch.zero_) for _ in range(5))[2]

    def __call__(self, run: Run) -> float:
        for _ in range(min(64, 1 + int(1.5 * self.host.get(run, 0.0) / self.cover))):
            self.scratch.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        began = time.perf_counter()
        run()
        host = time.perf_counter() - began
        end.record()
        end.synchronize()
        self.host[run] = min(host, self.host.get(run, host))
        return start.elapsed_time(end) / 1e3


def interleaved(
    cells: dict[str, Run],
    rounds: int | dict[str, int],
    warmup: int = 2,
    clock: Callable[[Run], float] = wall,
) -> dict[str, list[float]]:
    """Seconds of every cell in every round; each round has an order of its own, by fixed seed.

    With a number of rounds for each cell, a cell takes part in the first ones only.
    """
    order = random.Random(0)
    for _ in range(warmup):
        for run in cells.values():
            clock(run)
    each = dict.fromkeys(cells, rounds) if isinstance(rounds, int) else rounds
    times: dict[str, list[float]] = {name: [] for name in cells}
    for number in range(max(each.values(), default=0)):
        for name in order.sample(list(cells), len(cells)):
            if number < each[name]:
                times[name].append(clock(cells[name]))
    return times


def ratio(times: list[float], base: list[float], draws: int = 4000) -> dict[str, float]:
    """Median of the ratios round by round, with a 95 % bootstrap interval of that median.

    A cell of fewer rounds than the base is compared in those that it has.
    """
    ratios = [a / b for a, b in zip(times, base, strict=False)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(draws))
    return {
        "median": statistics.median(ratios),
        "low": medians[int(0.025 * len(medians))],
        "high": medians[int(0.975 * len(medians))],
    }


def student(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval (Student)."""
    from scipy import stats

    share = stats.t.ppf(0.975, len(values) - 1) / math.sqrt(len(values))
    return statistics.mean(values), share * statistics.stdev(values)


def compared(times: dict[str, list[float]], peaks: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A row for each cell: its time, over the plain one's, and its peak memory."""
    return {
        name: {
            "seconds": sorted(seconds)[len(seconds) // 2],
            "ratio": ratio(seconds, times["plain"]),
            "peak_mib": peaks.get(name),
        }
        for name, seconds in times.items()
    }


def quiet(rows: dict[str, dict[str, Any]]) -> bool:
    """Whether the plain cell over itself reads 1, but for noise."""
    return QUIET[0] <= rows[CONTROL]["ratio"]["median"] <= QUIET[1]


def table(rows: dict[str, dict[str, Any]], bars: dict[str, float] | None = None) -> None:
    """Print rows, with the bars that some of them have."""
    bars = bars or {}
    print(f"{'':14}{'s a step':>9}{'over plain':>12}{'95 % interval':>17}{'bar':>6}{'MiB':>7}")
    for name, row in rows.items():
        if "cannot" in row:
            print(f"{name:14}{row['cannot'][:86]}")
            continue
        r = row["ratio"]
        bar = f"{bars[name]:.2f}" if name in bars else ""
        mib = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        interval = f"{r['low']:.3f} - {r['high']:.3f}"
        print(f"{name:14}{row['seconds']:9.3f}{r['median']:12.3f}{interval:>17}{bar:>6}{mib:>7}")
    if CONTROL in rows and not quiet(rows):
        print("too noisy: plain against plain does not read 0.98 to 1.02")


def difference(
    truth: dict[str, Tensor],
    found: dict[str, Tensor],
    plain: dict[str, Tensor] | None = None,
    slack: float = torch.finfo(torch.bfloat16).eps,
) -> str | None:
    """Which gradient is wrong, None if none is.

    They may be off by 1e-4 of the largest of their kind; where plain ones of the same precision
    are given, by twice what these are, and by a slack of their kind's norm.
    """
    # Relative to the parameter's kind: a class token's own last table has a gradient of zero.
    sizes: dict[str, Tensor] = {}
    for name, wanted in truth.items():
        kind = name.split(".")[-1]
        size = wanted.abs().max() if plain is None else wanted.norm()
        sizes[kind] = torch.maximum(sizes.get(kind, size), size)
    for name, wanted in truth.items():
        size = sizes[name.split(".")[-1]]
        if plain is None:
            error, allowed = (found[name] - wanted).abs().max() / size, 1e-4
        else:
            error = (found[name] - wanted).norm() / size
            allowed = 2 * (plain[name] - wanted).norm() / size + slack
        if not error <= allowed:
            return f"{name} is off by {float(error):.1e}"
    return None


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


def gpu_peak(run: Run, before: int) -> float:
    """MiB of GPU memory that a call takes at its peak, above ``before`` bytes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = run()
    torch.cuda.synchronize()
    del held
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def reason(error: BaseException) -> str:
    """An error as one line."""
    text = " ".join(str(error).split())[:300]
    return text if type(error).__name__ == "IrpeError" else f"{type(error).__name__}: {text}"


def machine() -> dict[str, Any]:
    """Return the facts to store with a result: processor, threads, versions, GPU."""
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
        facts |= {"gpu": torch.cuda.get_device_name(), "driver": _driver()}
        facts |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        if importlib.util.find_spec("triton") is not None:
            facts["triton"] = importlib.import_module("triton").__version__
    return facts


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() or None


def suffix(device: str) -> str:
    """The end of a result file's name: the GPU's name, or cpu."""
    if device != "cuda":
        return device
    name = torch.cuda.get_device_name().lower().removeprefix("nvidia ")
    return re.sub(r"[^a-z0-9]+", "_", name)


def save(name: str, figures: dict[str, Any]) -> Path:
    """Write results as JSON into benchmarks/results/."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n")
    return path
