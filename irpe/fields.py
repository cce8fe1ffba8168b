"""Fields of a spec: each has a default, and checks values from Python or from a string.

::

    @dataclass(frozen=True, kw_only=True)
    class Shaw(irpe.Spec):
        clip: int = irpe.fields.count(64, always=True)
        on: str = irpe.fields.choice("k", "k", "kv")
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from numbers import Integral
from typing import Any

from .errors import IrpeError

Check = Callable[[str, object], Any]


def choice(default: str | None, *valid: str, aliases: Mapping[str, str] | None = None) -> Any:
    """Return a field whose value is one of several words.

    Args:
        default: the default; None: no value.
        valid: the allowed words.
        aliases: other spellings, mapped to allowed words.
    """

    def check(name: str, value: object) -> str:
        if isinstance(value, str):
            value = (aliases or {}).get(value, value)
        if not isinstance(value, str) or value not in valid:
            raise IrpeError(f"{name}={value!r} is not one of {', '.join(valid)}")
        return value

    return checked(default, check)


def number(default: float | None, most: float = 1e6) -> Any:
    """Return a field whose value is a positive number.

    Args:
        default: the default; None: no value.
        most: the largest number.
    """
    return checked(default, lambda name, value: positive(name, value, most))


def numbers(default: tuple[float, ...] | None, most: float = 1e6) -> Any:
    """Return a field whose value is a list of positive numbers, separated by colons in strings.

    Args:
        default: the default; None: no value.
        most: the largest number.
    """

    def check(name: str, value: object) -> tuple[float, ...]:
        given = value.split(":") if isinstance(value, str) else value
        if not isinstance(given, list | tuple) or not given:
            raise IrpeError(f"{name}={value!r} is not a list of numbers, such as 1:1.5:2")
        return tuple(positive(name, one, most) for one in given)

    return checked(default, check)


def count(default: int | None, least: int = 1, most: int = 2**20, always: bool = False) -> Any:
    """Return a field whose value is an integer.

    Args:
        default: the default; None: no value.
        least: the smallest value.
        most: the largest value.
        always: whether strings include the default, for fields that set the size of a table.
    """

    def check(name: str, value: object) -> int:
        read = value
        if isinstance(value, str):
            found = _float(value)
            read = int(found) if found is not None and found.is_integer() else value
        integer = isinstance(read, int | Integral) and not isinstance(read, bool)
        if not integer or not least <= read <= most:  # type: ignore[operator]
            raise IrpeError(f"{name}={value!r} is not an integer from {least} to {most}")
        return int(read)  # type: ignore[call-overload]

    return checked(default, check, always)


def flag(default: bool | None) -> Any:
    """Return a field whose value is a bool, 0 or 1 in strings.

    Args:
        default: the default; None: no value.
    """

    def check(name: str, value: object) -> bool:
        if isinstance(value, str) and value in ("0", "1"):
            return value == "1"
        if not isinstance(value, bool):
            raise IrpeError(f"{name}={value!r} is not 0 or 1")
        return value

    return checked(default, check)


def checked(default: Any, check: Check, always: bool = False) -> Any:
    """Return a field with your own check.

    Args:
        default: the default.
        check: a function of the field's name and a value, which is a string if it was parsed. It
            returns the value to store, or raises IrpeError.
        always: whether strings include the default.
    """
    return dataclasses.field(default=default, metadata={"check": check, "always": always})


def positive(name: str, value: object, most: float = 1e6) -> float:
    """Return a positive number as a float, from a number or its string (1e6, 0.5, 5e+5).

    Raises:
        IrpeError: if it is not a positive number, or above ``most``.
    """
    try:
        found = float(_float(value) if isinstance(value, str) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise IrpeError(f"{name}={value!r} is not a positive number, such as 1.9") from None
    if not (math.isfinite(found) and 0 < found <= most):
        raise IrpeError(f"{name}={value!r} must be a positive number of at most {most:g}")
    return found


_NUMBER = re.compile(r"([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,3})?", re.ASCII)


def _float(text: str) -> float | None:
    """Return the number of a string, in the notation of YAML and Python; None if it is none."""
    return float(text) if _NUMBER.fullmatch(text) else None


def spelled(value: object, keep_point: bool = False) -> str:
    """Return a field's value as a string without exponent and ``.0``."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, tuple):
        return ":".join(spelled(one) for one in value)
    if not isinstance(value, float):
        return str(value)
    # Decimal writes no exponent, whose minus sign would be read as a separator.
    text = format(Decimal(repr(value)), "f")
    return text if keep_point or not text.endswith(".0") else text[:-2]
