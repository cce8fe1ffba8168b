"""User errors, signals, and the exit status of scripts."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch.distributed as dist

import irpe


class UserError(Exception):
    """An invalid input; the message repeats it and states what is valid."""

    status = 2


class Interrupted(UserError):
    """A failure outside the run: the same command may succeed when it resumes."""

    status = 75  # "temporary failure" in sysexits.h


class Stopped(BaseException):
    """A signal ended the run. A BaseException, so that ``except Exception`` does not catch it."""

    def __init__(self, number: int, note: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{note}")
        self.number, self.note, self.status = number, note, 128 + number


class Signals:
    """Context manager that stores a signal in ``caught`` instead of ending the process.

    A second SIGINT raises KeyboardInterrupt, unless it comes within two seconds: launchers forward
    the Ctrl-C that the terminal has sent already.
    """

    def __init__(self) -> None:
        self.caught: int | None = None
        self._since = 0.0
        self._at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before if before is not None else signal.SIG_DFL)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise :class:`Stopped` immediately at a signal, for work that changes no state."""
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


def one_line(text: object) -> str:
    """Return ``text`` with every run of white space replaced by one space."""
    return " ".join(str(text).split())


def script(main: Callable[[Sequence[str] | None], None]) -> Callable[..., int]:
    """Return ``main(argv)`` wrapped into a function that returns an exit status.

    A :class:`UserError`, ``irpe.IrpeError`` and a full or read-only disk print one line
    ``error: ...`` on standard error and return 2 (75 for :class:`Interrupted`). :class:`Stopped`
    returns 128 plus the signal's number, as 143 for SIGTERM; Ctrl-C returns 130. Other exceptions
    are bugs and are not caught.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # for names that it cannot encode
                stream.reconfigure(errors="backslashreplace")
        try:
            main(argv)
            _leave_group()
        except (UserError, irpe.IrpeError) as error:
            print(f"error: {one_line(error)}", file=sys.stderr)
            return getattr(error, "status", 2)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            print(f"error: cannot write {str(error.filename)!r}: {error.strerror}", file=sys.stderr)
            return 2
        except Stopped as stopped:
            if stopped.note:
                print(one_line(stopped), file=sys.stderr)
            _leave_group()
            return stopped.status
        except KeyboardInterrupt:
            print("error: interrupted", file=sys.stderr)
            return 130
        return 0

    return run


def _leave_group() -> None:
    """Destroy the process group, whose threads may abort this process at exit."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
