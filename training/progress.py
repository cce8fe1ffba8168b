"""Progress of a run: one bar over all its steps, and a line per epoch."""

from __future__ import annotations

import sys
import time
from typing import Literal

from tqdm import tqdm

Style = Literal["auto", "bar", "lines", "none"]


class Progress:
    """A bar with metrics, throughput and the remaining time of the run.

    Args:
        style: "bar" with lines above it; "lines", for log files; "none"; or "auto", a bar on a
            terminal and lines elsewhere.
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
        """Count ``steps`` as done, in a resumed run."""
        self.steps -= steps  # the remaining time uses the steps of this process
        self._bar.initial = self._bar.n = steps

    def resume_clock(self) -> None:
        """Restart the clock after an evaluation or a checkpoint."""
        self._last = time.perf_counter()

    def step(self, epoch: int, units: int, metrics: dict[str, str] | None) -> None:
        """Advance by one step of ``units`` units; ``metrics`` are shown after the bar."""
        now = time.perf_counter()
        self._units, self._seconds = self._units + units, self._seconds + now - self._last
        self._last, self._done = now, self._done + 1
        self._bar.set_description_str(f"epoch {epoch + 1}/{self.epochs}", refresh=False)
        if metrics is not None:
            text = ", ".join(f"{key} {value}" for key, value in metrics.items())
            self._bar.set_postfix_str(f"{text}, {self.pace:,.0f} {self.unit}/s", refresh=False)
        self._bar.update()

    @property
    def pace(self) -> float:
        """Units of this process per second of training, without evaluation."""
        return self._units / max(self._seconds, 1e-9)

    @property
    def time_left(self) -> str:
        """Estimated remaining time of the run with evaluations, as h:mm:ss or m:ss."""
        elapsed = time.perf_counter() - self._begin
        left = elapsed / max(self._done, 1) * (self.steps - self._done)
        return tqdm.format_interval(left)

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self.style != "none":
            tqdm.write(text, file=sys.stderr)

    def warn(self, text: str) -> None:
        """Print a warning, in every style."""
        tqdm.write(f"warning: {text}", file=sys.stderr)

    def close(self) -> None:
        """Close the bar."""
        self._bar.close()


def clock() -> list[float]:
    """Return seconds, and CPU seconds of all threads of this process."""
    return [time.perf_counter(), time.process_time()]
