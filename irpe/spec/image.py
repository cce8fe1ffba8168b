"""Image relative position encoding keeps the string its users know.

``rpe-{ratio}-{method}-{mode}-{shared}-{on}``, with options behind commas::

    rpe-2.0-product-ctx-1-k
    rpe-2.0-product-ctx-1-k,index=clip,beta=4
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import IrpeError
from .grammar import Spec, positive, read_options, spelled

METHODS = ("euc", "quant", "rank", "cross", "product")
MODES = ("bias", "ctx")
INDEXES = ("piecewise", "clip")
_ALIASES = {"euclidean": "euc", "quantization": "quant", "contextual": "ctx"}
OPTIONS = ["index", "alpha", "beta", "gamma"]
MOST_BUCKETS = 2**22  # a table of 64 channels then has 1 GiB
MOST_RANKS = 2**16  # of all distances in a grid of more than 400x400
FORM = "rpe-{ratio}-{method}-{mode}-{shared}-{on}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RPE(Spec):
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

    axes: ClassVar[tuple[int, ...]] = (2,)
    neutral: ClassVar[bool] = True

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
            object.__setattr__(self, name, positive(name, value))
        alpha, beta, gamma = self.coefficients
        if int(beta) < 1:
            raise IrpeError(f"beta={beta:g} leaves a single bucket: at least 1 is needed")
        if self.method == "product" and (2 * int(beta) + 1) ** 2 > MOST_BUCKETS:
            raise IrpeError(
                f"beta={beta:g} makes {(2 * int(beta) + 1) ** 2} buckets of method product, "
                f"more than {MOST_BUCKETS}"
            )
        far = max(beta, gamma) if self.index == "piecewise" else beta
        if self.method == "rank" and far > MOST_RANKS:
            raise IrpeError(f"{far:g} ranks of distances are counted, more than {MOST_RANKS}")
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
        head = (spelled(self.ratio, keep_point=True), self.method, self.mode, str(int(self.shared)))
        return "-".join(("rpe", *head, self.on))

    def __str__(self) -> str:
        options = [("index", self.index)] if self.index != "piecewise" else []
        for name in ("alpha", "beta", "gamma"):
            value = getattr(self, name)
            if value is not None:
                options.append((name, spelled(value)))
        return ",".join([self._plain(), *(f"{name}={value}" for name, value in options)])


def read(head: str, options: list[str]) -> RPE:
    """The parts of a string; raises IrpeError for what is wrong with them."""
    parts = head.split("-")
    if parts[0] != "rpe" or len(parts) != 6:
        raise IrpeError(f"the form is {FORM}, as in rpe-2.0-product-ctx-1-k")
    _, ratio, method, mode, shared, on = parts
    if shared not in ("0", "1"):
        raise IrpeError(f"shared is 0 or 1, not {shared!r}")
    fields: dict[str, Any] = {"ratio": ratio, "method": method, "mode": mode, "on": on}
    return RPE(shared=shared == "1", **fields, **read_options(options, OPTIONS))


def _check_on(on: object, mode: str) -> None:
    if not isinstance(on, str) or not on or "".join(c for c in "qkv" if c in on) != on:
        raise IrpeError(f"on={on!r} is not one of q, k, v, qk, qv, kv, qkv")
    if "v" in on and mode == "bias":
        raise IrpeError(f"on={on!r} needs mode ctx: a bias has nothing to add to the value")
