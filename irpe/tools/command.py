"""The ``irpe`` command: reads the arguments, calls one module of ``commands/``, reports errors.

User errors print one line on standard error and exit with status 2. This module does not import
torch, so that ``irpe --help`` and usage errors are fast.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from ..errors import IrpeError
from .arguments import parser
from .plugins import import_plugins

# Package -> the extra that installs it.
_EXTRAS = {
    "matplotlib": "plot",
    "PIL": "plot",
    "numpy": "plot",
    "timm": "timm",
    "torchvision": "timm",
    "fvcore": "tools",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status. ``argv`` excludes the program's name."""
    argv = sys.argv[1:] if argv is None else argv
    top = parser()
    if not argv:
        print(top.format_help())
        return 0
    given = top.parse_args(argv)
    try:
        with warnings.catch_warnings():
            # Users cannot fix the deprecation warnings of other libraries.
            warnings.simplefilter("ignore")
            import_plugins(given.plugin)
            import_module(f".commands.{given.command}", __package__).run(given)
        sys.stdout.flush()
    except IrpeError as error:
        return _fail(str(error))
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        return _fail(
            f"irpe {given.command} needs {package}, which cannot be imported: "
            f'pip install "irpe[{_EXTRAS[package]}]"'
        )
    except BrokenPipeError:  # as in: irpe specs | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(f"{error.filename or 'irpe'}: {error.strerror or error}")
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return 0


def _fail(message: str, status: int = 2) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status
