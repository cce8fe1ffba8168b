"""What all specs share: checked fields, and strings ``name,option=value`` that say them.

A field's default is left out of the string, unless it decides the size of a table: so a string
stands for the same parameters for good.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from decimal import Decimal
from numbers import Integral
from typing import Any, ClassVar

from ..errors import IrpeError

Check = Callable[[str, object], Any]


class Spec:
    """An encoding as a frozen dataclass; ``str`` gives its string, ``irpe.parse`` reads it.

    ``names``: what its strings start with, and the fields that this says. ``axes``: how many
    numbers a position may have (1: text, 2: images). ``at_input``: whether it is added once, where
    a model begins, and not in its attention. ``neutral``: whether it changes nothing until trained.
    """

    __slots__ = ()
    names: ClassVar[dict[str, dict[str, Any]]] = {}
    axes: ClassVar[tuple[int, ...]] = (1,)
    at_input: ClassVar[bool] = False
    neutral: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                value = field.metadata["check"](field.name, value)
                object.__setattr__(self, field.name, value)
        self._agree()

    def _agree(self) -> None:
        """Raises IrpeError where fields do not go together."""

    def _head(self) -> str:
        said = self.names.items()
        return next(n for n, f in said if all(getattr(self, k) == v for k, v in f.items()))

    def __str__(self) -> str:
        head = self._head()
        parts = [head]
        for field in options(type(self), head):
            value = getattr(self, field.name)
            if value is not None and (field.metadata["always"] or value != field.default):
                parts.append(f"{field.name}={spelled(value)}")
        return ",".join(parts)


def options(kind: type[Spec], name: str) -> list[dataclasses.Field]:
    """The fields that options say where a string starts with a name."""
    return [f for f in dataclasses.fields(kind) if f.name not in kind.names[name]]  # type: ignore[arg-type]


def read_options(given: list[str], known: list[str]) -> dict[str, Any]:
    """``["clip=64"]`` as a dict of strings; raises IrpeError for names that are not known."""
    fields: dict[str, Any] = {}
    for option in given:
        name, equals, value = option.partition("=")
        if name not in known or not equals:
            valid = f"options are {', '.join(f'{o}=' for o in known)}" if known else "it has none"
            raise IrpeError(f"unknown option {option!r}; {valid}")
        if name in fields:
            raise IrpeError(f"{name} is given twice")
        fields[name] = value
    return fields


def choice(default: str | None, *valid: str) -> Any:
    """A field with one of some values."""

    def check(name: str, value: object) -> str:
        if not isinstance(value, str) or value not in valid:
            raise IrpeError(f"{name}={value!r} is not one of {', '.join(valid)}")
        return value

    return _field(default, check)


def number(default: float | None, most: float = 1e6) -> Any:
    """A field with a positive number."""
    return _field(default, lambda name, value: positive(name, value, most))


def count(default: int | None, least: int = 1, most: int = 2**20, always: bool = False) -> Any:
    """A field with an integer; ``always`` in the string, also where it is the default."""

    def check(name: str, value: object) -> int:
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
            value = int(value)
        integer = isinstance(value, int | Integral) and not isinstance(value, bool)
        if not integer or not least <= value <= most:  # type: ignore[operator]
            raise IrpeError(f"{name}={value!r} is not an integer from {least} to {most}")
        return int(value)  # type: ignore[call-overload]

    return _field(default, check, always)


def flag(default: bool | None) -> Any:
    """A field with a bool, 0 or 1 in strings."""

    def check(name: str, value: object) -> bool:
        if value in ("0", "1") and isinstance(value, str):
            return value == "1"
        if not isinstance(value, bool):
            raise IrpeError(f"{name}={value!r} is not 0 or 1")
        return value

    return _field(default, check)


def _field(default: Any, check: Check, always: bool = False) -> Any:
    return dataclasses.field(default=default, metadata={"check": check, "always": always})


def positive(name: str, value: object, most: float = 1e6) -> float:
    """A positive number, from a number or its string."""
    if isinstance(value, str) and not re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", value):
        raise IrpeError(f"{name}={value!r} is not a positive number, as 1.9")
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise IrpeError(f"{name}={value!r} is not a number") from None
    if not (math.isfinite(found) and 0 < found <= most):
        raise IrpeError(f"{name}={value!r} must be a positive number of at most {most:g}")
    return found


def spelled(value: object, keep_point: bool = False) -> str:
    """A field's value in a string."""
    if isinstance(value, bool):
        return str(int(value))
    if not isinstance(value, float):
        return str(value)
    # Decimal spells out small numbers: an exponent's minus would read as a separator.
    text = format(Decimal(repr(value)), "f")
    return text if keep_point or not text.endswith(".0") else text[:-2]
