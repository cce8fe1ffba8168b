"""What a run shows while it goes: one bar over all its steps, and a line per epoch."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class Progress:
    """A bar with loss, accuracy, images per second and the time left of the whole run.

    Args:
        steps: optimiser steps of the run.
        epochs: epochs of the run.
        enabled: False shows nothing at all (other processes, ``run.progress: false``).
    """

    def __init__(self, steps: int, epochs: int, enabled: bool) -> None:
        self.epochs, self.enabled = epochs, enabled
        interactive = sys.stderr.isatty()
        self._bar = tqdm(
            total=steps,
            disable=not enabled,
            dynamic_ncols=True,
            # A log file wants a line now and then, not ten a second.
            mininterval=0.2 if interactive else 20.0,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining} left{postfix}",
        )
        self._images, self._seconds, self._last = 0, 0.0, time.perf_counter()

    def resume_clock(self) -> None:
        """Start counting time again, after something that is not training."""
        self._last = time.perf_counter()

    def step(self, epoch: int, images: int, figures: dict[str, str] | None) -> None:
        """Advance by one step of ``images`` images; ``figures`` are shown behind the bar."""
        now = time.perf_counter()
        self._images, self._seconds = self._images + images, self._seconds + now - self._last
        self._last = now
        self._bar.set_description_str(f"epoch {epoch + 1}/{self.epochs}", refresh=False)
        if figures is not None:
            shown = {**figures, "img/s": f"{self.images_per_second:,.0f}"}
            text = ", ".join(f"{key} {value}" for key, value in shown.items())
            self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()

    @property
    def images_per_second(self) -> float:
        """Images of this process per second of training, evaluation not counted."""
        return self._images / max(self._seconds, 1e-9)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.enabled:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
