"""One exception for what the user can put right, and one way to report it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

import torch.distributed as dist

import irpe


class UserError(Exception):
    """Something the user gave cannot be used; the message repeats it and says what would work."""


def one_line(text: object) -> str:
    """Return ``text`` with every run of white space, line breaks included, as one space."""
    return " ".join(str(text).split())


def script(main: Callable[[Sequence[str] | None], None]) -> Callable[..., int]:
    """Turn ``main(argv)`` into a function that returns an exit status.

    A :class:`UserError` or ``irpe.IrpeError`` becomes the single line ``error: ...`` on standard
    error and status 2; Ctrl-C becomes status 130. Any other exception is a bug and keeps its
    traceback.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            main(argv)
            if dist.is_available() and dist.is_initialized():
                # Else the threads of the others' connections may abort this process as it exits.
                dist.destroy_process_group()
        except (UserError, irpe.IrpeError) as error:
            print(f"error: {one_line(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("error: interrupted", file=sys.stderr)
            return 130
        return 0

    return run
