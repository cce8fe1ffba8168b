"""What position terms cost: attention with them over torch's flash attention, in one command.

    python benchmarks/attention.py                       # a GPU: all that fits into 8 minutes
    python benchmarks/attention.py --original DIR        # also the original's irpe.py, from DIR
    python benchmarks/attention.py --device cpu          # float32, batches that a CPU can do
    python benchmarks/attention.py --device cpu --tiny   # every step, toy sizes: times mean nothing

Each case (dtype, head dim, method, length) first passes a gate on correctness; a way of computing
that fails it is not timed. Then all ways are timed in turns, forward and forward + backward, and
compared round by round with flash attention, which is itself timed twice: "control" must read
0.98 to 1.02. A forward pass keeps what its backward needs. Cases come in order of importance;
those that no time is left for are listed. See benchmarks/README.md.
"""

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from contenders import MODES, Case
from measure import RESULTS, machine, save, suffix
from report import headline, plot, report
from session import RED, Settings, compile_ahead, serve

BARS = {"bias": 1.15, "k": 1.3, "qk": 1.6, "qkv": 2.0}  # forward + backward, bfloat16
TOKENS = {"cuda": 65536, "cpu": 2048}  # of a batch, about: B * L
PATIENCE = 90  # seconds without a word, then a process hangs
GRIDS = [(14, 14, 1), (64, 64, 0), (24, 24, 1), (32, 32, 1), (42, 42, 0), (7, 7, 1)]
CPU_GRIDS = [(14, 14, 1), (32, 32, 1), (42, 42, 0), (24, 24, 1)]
DETR_GRIDS = [(25, 34, 0), (42, 42, 0)]
AHEAD = 20  # cases that are compiled for ahead: as many as there may be time for
SOME = [(14, 14, 1), (32, 32, 1)]


def cases(device: str, tiny: bool) -> list[Case]:
    """The most important first."""
    if tiny:
        return [
            Case(3, 3, 1, 16, 1, 1, "float32", "product"),
            Case(2, 3, 0, 16, 2, 1, "float16", "cross"),
        ]

    def some(dtype: str, dim: int, methods: tuple[str, ...], grids: list) -> Iterator[Case]:
        heads = 6 if dim == 64 else 8
        for method, (height, width, prefix) in itertools.product(methods, grids):
            batch = max(1, round(TOKENS[device] / (prefix + height * width)))
            yield Case(height, width, prefix, dim, heads, batch, dtype, method)

    if device == "cpu":
        return list(some("float32", 64, ("product",), CPU_GRIDS))
    methods = ("product", "cross", "euc")
    order = [
        *some("bfloat16", 64, ("product",), GRIDS),
        *some("bfloat16", 32, ("product",), DETR_GRIDS),
        *some("bfloat16", 64, ("cross", "euc"), SOME),
        *some("float32", 64, ("product",), SOME),
        *some("float32", 32, ("product",), DETR_GRIDS[:1]),
    ]
    for dtype in ("bfloat16", "float32"):
        order += [*some(dtype, 64, methods, GRIDS), *some(dtype, 32, methods, DETR_GRIDS)]
    return list(dict.fromkeys(order))


class Worker:
    """A process that measures cases."""

    def __init__(self, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=serve, args=(far, settings), daemon=True)
        self.process.start()
        far.close()

    def measure(self, case: Case, without: dict[str, str], until: float) -> tuple[str, Any, str]:
        """How it went ("done", "failed", "fatal", "died", "hangs", "time"), figures, last step."""
        step = "start"
        try:
            self.pipe.send((case, without))
            while True:
                left = until - time.monotonic()
                if not self.pipe.poll(max(0.0, min(PATIENCE, left))):
                    return ("time" if left < PATIENCE else "hangs"), "nothing for too long", step
                kind, value = self.pipe.recv()
                if kind != "step":
                    return kind, value, step
                step = value
        except (EOFError, OSError):
            self.process.join(10)
            return "died", f"its process died, exit code {self.process.exitcode}", step

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def drive(
    order: list[Case], settings: Settings, until: float, done: Callable[[dict], None]
) -> list[str]:
    """Measure cases until the time is over, ``done`` with each; returns those left out."""
    worker: Worker | None = None
    without: dict[str, str] = {}
    everywhere: dict[str, str] = {}  # what hung once or died twice is not tried again
    deaths: Counter[str] = Counter()
    longest = 0.0
    waiting = list(order)
    while waiting and until - time.monotonic() > longest:
        case, start = waiting[0], time.monotonic()
        worker = worker or Worker(settings)
        how, figures, step = worker.measure(case, everywhere | without, until)
        if how not in ("done", "failed"):
            worker.stop()
            worker = None
        if how == "time":
            break
        if how in ("fatal", "died", "hangs") and step.split()[0] not in ("start", "timing"):
            without[step] = figures  # the same case again, without this step
            deaths[step] += 2 if how == "hangs" else 1
            if deaths[step] >= 2:
                everywhere[step] = f"{figures}, in {case}"
            continue
        if how != "done":
            figures = {"case": str(case), "cannot": f"{step}: {figures}"}
        longest = max(longest, time.monotonic() - start)
        done({"case": str(case), **figures})
        waiting.pop(0)
        without = {}
    if worker is not None:
        worker.stop()
    return [str(case) for case in waiting]


def warm(order: list[Case], settings: Settings, processes: int, seconds: float) -> None:
    """Compile what the cases need, in several processes and in the same order."""
    jobs, bare = [], set()
    for case in order[:AHEAD]:
        if (case.dtype, case.dim) not in bare:
            bare.add((case.dtype, case.dim))
            jobs.append((case, "no terms", "", settings))
        jobs += [(case, "triton", mode, settings) for mode in MODES]
        if settings.device == "cuda":
            jobs += [(case, "flex", mode, settings) for mode in ("bias", "k", "qk")]
    before = os.environ.get("TORCHINDUCTOR_COMPILE_THREADS")
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map_async(compile_ahead, jobs, chunksize=1).wait(seconds)
    if before is None:
        del os.environ["TORCHINDUCTOR_COMPILE_THREADS"]
    else:
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = before


def main() -> None:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if gpu else "cpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--rounds", type=int, default=25, help="at most, for each way")
    parser.add_argument("--original", type=Path, help="folder with the original's irpe.py")
    parser.add_argument("--tiny", action="store_true", help="two toy cases, one round")
    parser.add_argument("--name", help="name of the result files; attention_<gpu> otherwise")
    few = min(12, max(1, (os.cpu_count() or 1) - 2)) if gpu else 0
    parser.add_argument("--processes", type=int, default=few, help="that compile ahead")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not gpu:
        parser.error("there is no GPU: --device cpu --tiny tries the script itself")
    if arguments.original is not None and not (arguments.original / "irpe.py").is_file():
        parser.error(f"--original {arguments.original}: there is no irpe.py in it")

    rounds, attempts = (1, 1) if arguments.tiny else (arguments.rounds, 2)
    settings = Settings(arguments.device, rounds, attempts, arguments.original)
    name = arguments.name or f"attention_{suffix(arguments.device)}"
    order = cases(arguments.device, arguments.tiny)
    figures: dict[str, Any] = {
        "command": " ".join(["python benchmarks/attention.py", *sys.argv[1:]]),
        "machine": machine(),
        "float32_products": torch.get_float32_matmul_precision(),
        "bars": BARS,
        "left_out": [str(case) for case in order],
        "cases": [],
    }

    def done(case: dict) -> None:
        figures["cases"].append(case)
        figures["left_out"].remove(case["case"])
        figures["seconds"] = time.monotonic() - begun
        save(name, figures)
        print(f"{figures['seconds']:4.0f} s  {headline(case)}", flush=True)

    if arguments.processes:
        warm(order, settings, arguments.processes, 15 * arguments.minutes)
        print(f"{time.monotonic() - begun:4.0f} s  compiled ahead", flush=True)
    drive(order, settings, begun + 60 * arguments.minutes - 10, done)
    save(name, figures)
    report(figures)
    drawn = plot(figures, RESULTS / f"{name}.png")
    print(f"written to {name}.json" + (f" and {name}.png" if drawn else ""))
    if any(gate.startswith(RED) for c in figures["cases"] for gate in c.get("gate", {}).values()):
        sys.exit("error: a gate is red, see above")


if __name__ == "__main__":
    main()
