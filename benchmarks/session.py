"""One case of benchmarks/attention.py: the gate, every way once, then all ways interleaved.

Runs in a process of its own, told what to do through a pipe, so that a way that hangs or brings
the GPU down costs the benchmark that way and no more.
"""

import dataclasses
import gc
import statistics
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from contenders import BASES, LIMITS, MODES, WAYS, Cannot, Case, Forward, Inputs, limit, way
from measure import QUIET, Events, Run, gpu_peak, interleaved, ratio, reason, wall
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from fused import compare  # the tests' own comparison, with their error budget

CONTROL = "control"
PASSED, RED = "passed", "the gate is red"
# Seconds of the clock that a way gets for its rounds, forward or both.
SHARE = {"cuda": 0.25, "cpu": 1.0}
DIFFERS = 0.5  # relative: rounding in bfloat16 stays below, a gradient that is missing does not


@dataclasses.dataclass(frozen=True)
class Settings:
    """What holds for all cases."""

    device: str
    rounds: int
    attempts: int
    original: Path | None


def serve(pipe: Connection, settings: Settings) -> None:
    """Answer each (case, what to leave out) with ("done" | "failed" | "fatal", what came of it)."""
    torch.set_num_threads(2)
    while True:
        case, without = pipe.recv()
        try:
            pipe.send(("done", Session(case, settings, without, pipe.send).figures()))
        except Exception as error:
            if _fatal(error):
                pipe.send(("fatal", reason(error)))
                return
            pipe.send(("failed", reason(error)))
        _clear()


class Session:
    """The results of a case.

    Args:
        without: steps to skip, each with the reason to report.
        tell: called with ("step", name) before each step.
    """

    def __init__(
        self,
        case: Case,
        settings: Settings,
        without: dict[str, str],
        tell: Callable[[tuple[str, str]], object],
    ) -> None:
        self.case, self.settings, self.without, self.tell = case, settings, without, tell
        self.cuda = settings.device == "cuda"
        self.rows: dict[str, dict[str, Any]] = {}
        self.ready: dict[str, dict[str, Run]] = {}
        torch.manual_seed(0)
        torch._dynamo.reset()  # compiled code is kept for few shapes only

    def figures(self) -> dict[str, Any]:
        gates = {mode or "no terms": self._gate(mode) for mode in ("", *MODES)}
        clock = Events() if self.cuda else wall
        inputs = Inputs(self.case, self.settings.device)
        base = None
        for name in LIMITS:
            if name in BASES and base is not None:
                continue
            red = name == "no terms" and gates[name] != PASSED
            self._prepare(name, "", lambda name=name: limit(name, inputs), inputs, None, red)
            base = name if name in self.ready and name in BASES else base
        if base is None:
            raise Cannot("no plain attention of torch runs: " + self.rows["flash"]["cannot"])
        for mode in MODES:
            truth: list[Tensor] = []
            for name in WAYS:
                if name == "original" and self.settings.original is None:
                    continue
                if name == "eager" and self.cuda and "sdpa" in self._did(mode):
                    continue
                make = lambda name=name, mode=mode: way(  # noqa: E731
                    name, mode, inputs, self.settings.original
                )
                red = name == "triton" and gates[mode] != PASSED
                self._prepare(f"{mode} {name}", mode, make, inputs, truth, red)
        quiet = self._time(base, clock)
        return {
            **dataclasses.asdict(self.case), "length": self.case.length, "gate": gates,
            "base": base, "quiet": quiet, "rows": self.rows,
        }  # fmt: skip

    def _did(self, mode: str) -> set[str]:
        return {name.removeprefix(f"{mode} ") for name in self.ready if name.startswith(f"{mode} ")}

    def _gate(self, mode: str) -> str:
        """ "passed", or why our kernels are not timed in this mode."""
        step = f"gate {mode or 'no terms'}"
        if step in self.without:
            return self.without[step]
        self.tell(("step", step))
        try:
            inputs = Inputs(self.case, self.settings.device, batch=2)
            compare(inputs.qkv, inputs.terms(mode), inputs.grad.dtype)
        except AssertionError as error:
            return f"{RED}: {reason(error)}"
        except Exception as error:
            if _fatal(error):
                raise
            return reason(error)
        return PASSED

    def _prepare(
        self,
        name: str,
        mode: str,
        make: Callable[[], Forward],
        inputs: Inputs,
        truth: list[Tensor] | None,
        red: bool,
    ) -> None:
        """Run a way once: it compiles, and shows its memory and whether it computes the same."""
        if red or name in self.without:
            self.rows[name] = {"cannot": self.without.get(name, "its gate has not passed")}
            return
        self.tell(("step", name))
        try:
            before = torch.cuda.memory_allocated() if self.cuda else 0
            forward = make()
            wanted = [*inputs.qkv, *inputs.tables(mode)]
            runs: dict[str, Run] = {"forward": forward}
            if forward().requires_grad:
                runs["both"] = lambda: torch.autograd.grad(forward(), wanted, inputs.grad)
            for run in runs.values():
                run()  # compiles; only then is memory what it is from now on
            row: dict[str, Any] = {
                kind: {"mib": gpu_peak(run, before) if self.cuda else None}
                for kind, run in runs.items()
            }
            out = forward()
            found = [out.detach()]
            if "both" in runs:
                found += torch.autograd.grad(out, wanted, inputs.grad)
            del out
            if truth:
                row["differs"] = _difference(found, truth)
                if not row["differs"] < DIFFERS:  # nor is NaN
                    raise Cannot(f"it computes something else: differs by {row['differs']:.2g}")
            elif truth is not None:
                truth += found
            del found
            if "both" not in runs:
                row["both"] = {"cannot": f"no backward on {self.settings.device}"}
            self.rows[name], self.ready[name] = row, runs
        except Exception as error:
            if _fatal(error):
                raise
            self.rows[name] = {"cannot": str(error) if type(error) is Cannot else reason(error)}
            del error
            _clear()

    def _time(self, base: str, clock: Callable[[Run], float]) -> bool:
        """Fill in the times; whether the control was quiet, forward and both."""
        calm = [self._time_kind(kind, base, clock) for kind in ("forward", "both")]
        return all(calm)

    def _time_kind(self, kind: str, base: str, clock: Callable[[Run], float]) -> bool:
        self.tell(("step", f"timing {kind}"))
        failed: dict[str, str] = {}
        cells = {
            name: _guarded(name, runs[kind], failed)
            for name, runs in self.ready.items()
            if kind in runs
        }
        cells[CONTROL] = _guarded(CONTROL, self.ready[base][kind], failed)
        first = interleaved(cells, 1, warmup=0, clock=clock)
        most, share = self.settings.rounds, SHARE[self.settings.device]
        rounds = {name: min(most, max(5, int(share / s))) for name, (s,) in first.items()}
        rounds[base] = rounds[CONTROL] = max(rounds.values())
        for _ in range(self.settings.attempts):
            times = interleaved(cells, rounds, warmup=0, clock=clock)
            control = ratio(times[CONTROL], times[base], draws=1000)
            if QUIET[0] <= control["median"] <= QUIET[1]:
                break
        for name, seconds in times.items():
            if name in failed:
                self.rows[name][kind] = {"cannot": failed[name]}
                continue
            row = self.rows.setdefault(name, {}).setdefault(kind, {})
            row |= {"ms": 1e3 * statistics.median(seconds), "rounds": len(seconds)}
            row["ratio"] = ratio(seconds, times[base], draws=1000)
            if isinstance(clock, Events):
                row["host_ms"] = 1e3 * clock.host[cells[name]]
        return QUIET[0] <= control["median"] <= QUIET[1]


def _guarded(name: str, run: Run, failed: dict[str, str]) -> Run:
    """A run that gives up for good when memory runs out."""

    def call() -> None:
        if name in failed:
            return
        try:
            run()
        except torch.OutOfMemoryError as error:
            failed[name] = reason(error)
            _clear()

    return call


def _difference(found: list[Tensor], truth: list[Tensor]) -> float:
    """The largest ||a - b|| / ||b|| of output and gradients, as far as both have them."""
    pairs = zip(found, truth, strict=False)
    errors = torch.stack([(a.float() - b.float()).norm() / b.float().norm() for a, b in pairs])
    return float(errors.max())


def _fatal(error: Exception) -> bool:
    """Whether the GPU refuses all work of this process from now on."""
    return "CUDA error" in str(error) or "device-side assert" in str(error)


def _clear() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compile_ahead(job: tuple[Case, str, str, Settings]) -> None:
    """Run a way once, so that what it compiles lies in the caches on disk."""
    case, name, mode, settings = job
    torch.set_num_threads(1)
    try:
        # Our kernels are compiled for any batch size; FlexAttention is compiled for one.
        inputs = Inputs(case, settings.device, batch=case.batch if name == "flex" else 2)
        forward = way(name, mode, inputs, None) if mode else limit(name, inputs)
        out = forward()
        if out.requires_grad:
            torch.autograd.grad(out, [*inputs.qkv, *inputs.tables(mode)], inputs.grad)
    except Exception as error:  # the case itself will say so
        print(f"compiling ahead: {case} {mode} {name}: {reason(error)[:60]}", flush=True)
    torch._dynamo.reset()
    _clear()
