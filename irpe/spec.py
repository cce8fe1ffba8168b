"""Encodings as strings: ``parse`` makes a frozen dataclass, ``str`` gives the string back.

Image relative position encoding keeps the string its users know,
``rpe-{ratio}-{method}-{mode}-{shared}-{on}``, with options behind commas::

    rpe-2.0-product-ctx-1-k
    rpe-2.0-product-ctx-1-k,index=clip,beta=4
"""

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from .errors import IrpeError

METHODS = ("euc", "quant", "rank", "cross", "product")
MODES = ("bias", "ctx")
INDEXES = ("piecewise", "clip")
_ALIASES = {"euclidean": "euc", "quantization": "quant", "contextual": "ctx"}
_OPTIONS = ("index", "alpha", "beta", "gamma")
_FORM = "rpe-{ratio}-{method}-{mode}-{shared}-{on}, as in rpe-2.0-product-ctx-1-k"


@dataclass(frozen=True, slots=True, kw_only=True)
class RPE:
    """Image relative position encoding (Wu et al., ICCV 2021).

    Args:
        ratio: scales the piecewise index: alpha = ratio, beta = 2 ratio, gamma = 8 ratio (Eq. 18),
            in units of patches.
        method: ``euc``, ``quant`` (squared distances, as the authors released it), ``rank`` (ranks
            of distances, as in the paper's Eq. 20), ``cross`` or ``product``.
        mode: ``bias`` (a scalar for each bucket, Eq. 13) or ``ctx`` (a vector that meets the
            content, Eq. 15).
        shared: one table for all heads, or one for each head.
        on: which of the projections ``q``, ``k``, ``v`` are encoded, in this order. ``v`` needs
            mode ``ctx``.
        index: ``piecewise`` (Eq. 18) or ``clip``.
        alpha, beta, gamma: override what follows from ``ratio``.

    Raises:
        IrpeError: for any value outside of these.
    """

    ratio: float = 1.9
    method: str = "product"
    mode: str = "ctx"
    shared: bool = True
    on: str = "k"
    index: str = "piecewise"
    alpha: float | None = None
    beta: float | None = None
    gamma: float | None = None

    def __post_init__(self) -> None:
        for name, valid in (("method", METHODS), ("mode", MODES), ("index", INDEXES)):
            value = getattr(self, name)
            value = _ALIASES.get(value, value) if isinstance(value, str) else value
            if value not in valid:
                raise IrpeError(f"{name}={value!r} is not one of {', '.join(valid)}")
            object.__setattr__(self, name, value)
        if not isinstance(self.shared, bool):
            raise IrpeError(f"shared={self.shared!r} is not a bool")
        _check_on(self.on, self.mode)
        for name in ("ratio", "alpha", "beta", "gamma"):
            value = getattr(self, name)
            if value is None and name != "ratio":
                continue
            object.__setattr__(self, name, _positive(name, value))
        alpha, beta, gamma = self.coefficients
        if int(beta) < 1:
            raise IrpeError(f"beta={beta:g} leaves a single bucket: at least 1 is needed")
        if self.index == "piecewise" and not alpha <= beta:
            raise IrpeError(f"alpha={alpha:g} must not exceed beta={beta:g} in {self._plain()}")
        if self.index == "piecewise" and not alpha < gamma:
            raise IrpeError(f"alpha={alpha:g} must be below gamma={gamma:g} in {self._plain()}")

    @property
    def coefficients(self) -> tuple[float, float, float]:
        """alpha, beta, gamma of the piecewise index (Eq. 18), overrides applied."""
        given = (self.alpha, self.beta, self.gamma)
        alpha, beta, gamma = (
            g if g is not None else m * self.ratio for g, m in zip(given, (1, 2, 8), strict=True)
        )
        return alpha, beta, gamma

    def _plain(self) -> str:
        head = (_number(self.ratio, keep_point=True), self.method, self.mode, str(int(self.shared)))
        return "-".join(("rpe", *head, self.on))

    def __str__(self) -> str:
        options = [("index", self.index)] if self.index != "piecewise" else []
        for name in ("alpha", "beta", "gamma"):
            value = getattr(self, name)
            if value is not None:
                options.append((name, _number(value)))
        return ",".join([self._plain(), *(f"{name}={value}" for name, value in options)])


def parse(spec: "str | RPE") -> RPE:
    """Parse a spec string; a spec that is parsed already comes back as it is.

    Raises:
        IrpeError: naming the part that is wrong and the values it may take.
    """
    if isinstance(spec, RPE):
        return spec
    if not isinstance(spec, str):
        raise IrpeError(f"a spec is a string or irpe.RPE, not {type(spec).__name__}: {spec!r}")
    head, *options = spec.split(",")
    parts = head.split("-")
    if parts[0] != "rpe" or len(parts) != 6:
        raise IrpeError(f"cannot parse the spec {spec!r}: the form is {_FORM}")
    _, ratio, method, mode, shared, on = parts
    if shared not in ("0", "1"):
        raise IrpeError(f"cannot parse the spec {spec!r}: shared is 0 or 1, not {shared!r}")
    fields: dict[str, Any] = {"ratio": ratio, "method": method, "mode": mode, "on": on}
    for option in options:
        name, equals, value = option.partition("=")
        if name not in _OPTIONS or not equals:
            raise IrpeError(
                f"cannot parse the spec {spec!r}: unknown option {option!r}; "
                f"options are {', '.join(f'{o}=' for o in _OPTIONS)}"
            )
        if name in fields:
            raise IrpeError(f"cannot parse the spec {spec!r}: {name} is given twice")
        fields[name] = value
    try:
        return RPE(shared=shared == "1", **fields)
    except IrpeError as error:
        raise IrpeError(f"cannot parse the spec {spec!r}: {error}") from None


def _check_on(on: object, mode: str) -> None:
    if not isinstance(on, str) or not on or "".join(c for c in "qkv" if c in on) != on:
        raise IrpeError(f"on={on!r} is not one of q, k, v, qk, qv, kv, qkv")
    if "v" in on and mode == "bias":
        raise IrpeError(f"on={on!r} needs mode ctx: a bias has nothing to add to the value")


def _positive(name: str, value: object) -> float:
    if isinstance(value, str) and not re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", value):
        raise IrpeError(f"{name}={value!r} is not a positive number, as 1.9")
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise IrpeError(f"{name}={value!r} is not a number") from None
    if not (math.isfinite(number) and 0 < number <= 1e6):
        raise IrpeError(f"{name}={value!r} must be a positive number of at most 1e6")
    return number


def _number(value: float, keep_point: bool = False) -> str:
    # Decimal spells out small numbers: an exponent's minus would read as a separator.
    text = format(Decimal(repr(value)), "f")
    return text if keep_point or not text.endswith(".0") else text[:-2]
