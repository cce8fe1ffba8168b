"""Plugins: user modules that register encodings, backends and libraries."""

import os
import sys
from collections.abc import Iterable
from importlib import import_module

from ..errors import IrpeError


def import_plugins(modules: Iterable[str]) -> None:
    """Import modules by name, ``mine`` for mine.py, also from the working directory.

    Raises:
        IrpeError: if a module does not exist.
    """
    for name in modules:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            import_module(name)
        except (ModuleNotFoundError, TypeError, ValueError) as error:
            if getattr(error, "name", name) not in (name, name.partition(".")[0]):
                raise  # the plugin exists, but one of its imports does not
            raise IrpeError(
                f"plugin {name!r} cannot be imported: give the name of a module, as mine for "
                "mine.py, which is installed or in the working directory"
            ) from None
