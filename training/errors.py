"""One exception for what the user can put right, and one way to report it."""

from __future__ import annotations

import errno
import functools
import signal
import sys
from collections.abc import Callable, Sequence

import torch.distributed as dist

import irpe


class UserError(Exception):
    """Something the user gave cannot be used; the message repeats it and says what would work."""

    status = 2


class Interrupted(UserError):
    """Something beside the run failed: the same command may well succeed when it goes on."""

    status = 75  # "temporary failure" in sysexits.h


class Stopped(BaseException):
    """A signal asked the run to end. Not an Exception, so that nothing takes it for a failure."""

    def __init__(self, number: int, note: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{note}")
        self.number, self.note, self.status = number, note, 128 + number


def one_line(text: object) -> str:
    """Return ``text`` with every run of white space, line breaks included, as one space."""
    return " ".join(str(text).split())


def script(main: Callable[[Sequence[str] | None], None]) -> Callable[..., int]:
    """Turn ``main(argv)`` into a function that returns an exit status.

    A :class:`UserError` or ``irpe.IrpeError`` becomes the single line ``error: ...`` on standard
    error and status 2 (75 for an :class:`Interrupted`), and so does a full or read-only disk;
    :class:`Stopped` becomes status 128 and the signal's number, as 143 for SIGTERM; Ctrl-C 130.
    Any other exception is a bug and keeps its traceback.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
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
    """Else the threads of the others' connections may abort this process as it exits."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
