"""Stop when asked to, between two steps: SIGTERM, and the first SIGINT."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from training.errors import Stopped


class Signals:
    """While entered, a signal is noted in ``caught`` instead of ending the process.

    A second SIGINT interrupts as ever. One within two seconds does not count: launchers pass on the
    Ctrl-C that the terminal has already sent.
    """

    def __init__(self) -> None:
        self.caught: int | None = None
        self._since = 0.0
        self._at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # others may not
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before if before is not None else signal.SIG_DFL)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """In here a signal raises :class:`Stopped`, as what is done changes nothing that counts."""
        if self.caught is not None:
            raise Stopped(self.caught)
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.caught is None:
            self.caught, self._since = number, time.monotonic()
            if self._at_once:
                raise Stopped(number)
        elif number == signal.SIGINT and time.monotonic() - self._since > 2:
            raise KeyboardInterrupt
