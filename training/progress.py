"""What a run shows while it goes: one bar over all its steps, and a line per epoch."""

from __future__ import annotations

import sys
import time
from typing import Literal

from tqdm import tqdm

Style = Literal["auto", "bar", "lines", "none"]


class Progress:
    """A bar with loss and other figures, the pace and the time left of the whole run.

    Args:
        steps: optimiser steps of the run.
        epochs: epochs of the run.
        style: "bar" and the lines above it; "lines" alone, as suits a log file; "none"; "auto"
            is a bar on a terminal and lines elsewhere.
        unit: what the pace counts.
    """

    def __init__(self, steps: int, epochs: int, style: Style, unit: str = "images") -> None:
        if style == "auto":
            style = "bar" if sys.stderr.isatty() else "lines"
        self.steps, self.epochs, self.style, self.unit = steps, epochs, style, unit
        self._bar = tqdm(
            total=steps,
            disable=style != "bar",
            dynamic_ncols=True,
            mininterval=0.2,
            bar_format="{desc} {percentage:3.0f}% {bar} {elapsed} gone, {remaining} left{postfix}",
        )
        self._begin = self._last = time.perf_counter()
        self._units, self._seconds, self._done = 0, 0.0, 0

    def skip(self, steps: int) -> None:
        """Count ``steps`` as done before, by a run that is gone on with."""
        self.steps -= steps  # the pace is that of this run
        self._bar.initial = self._bar.n = steps

    def resume_clock(self) -> None:
        """Start counting time again, after something that is not training."""
        self._last = time.perf_counter()

    def step(self, epoch: int, units: int, figures: dict[str, str] | None) -> None:
        """Advance by one step of ``units`` units; ``figures`` are shown behind the bar."""
        now = time.perf_counter()
        self._units, self._seconds = self._units + units, self._seconds + now - self._last
        self._last, self._done = now, self._done + 1
        self._bar.set_description_str(f"epoch {epoch + 1}/{self.epochs}", refresh=False)
        if figures is not None:
            text = ", ".join(f"{key} {value}" for key, value in figures.items())
            self._bar.set_postfix_str(f"{text}, {self.pace:,.0f} {self.unit}/s", refresh=False)
        self._bar.update()

    @property
    def pace(self) -> float:
        """Units of this process per second of training, evaluation not counted."""
        return self._units / max(self._seconds, 1e-9)

    @property
    def time_left(self) -> str:
        """Time left of the run at its pace so far, evaluation counted, as h:mm:ss or m:ss."""
        elapsed = time.perf_counter() - self._begin
        left = elapsed / max(self._done, 1) * (self.steps - self._done)
        return tqdm.format_interval(left)

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self.style != "none":
            tqdm.write(text, file=sys.stderr)

    def warn(self, text: str) -> None:
        """Print a line whatever the style, as it tells of something that went wrong."""
        tqdm.write(f"warning: {text}", file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


class Clock:
    """Seconds, and CPU seconds of all threads of this process, since :meth:`start`.

    Args:
        spent: seconds before that, by a run that is gone on with.
    """

    def __init__(self, spent: dict[str, float] | None = None) -> None:
        self.spent = spent or {"seconds": 0.0, "train_cpu_seconds": 0.0}
        self.start()

    def start(self) -> None:
        self._begin = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        now = time.perf_counter(), time.process_time()
        past = [after - before for after, before in zip(now, self._begin, strict=True)]
        return {
            name: value + more for (name, value), more in zip(self.spent.items(), past, strict=True)
        }
