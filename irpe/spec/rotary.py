"""Rotary position embeddings: of texts, and of images by two axes.

::

    rope
    rope,layout=half,base=500000,fraction=0.5,scaling=yarn,factor=4,original=4096
    rope-axial
    rope-mixed
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import IrpeError
from .grammar import Spec, choice, count, number


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope(Spec):
    """Rotary position embedding (Su et al., 2021, arXiv 2104.09864).

    Args:
        layout: which channels are a pair: ``interleaved`` (2t, 2t + 1), as in the paper, or
            ``half`` (t, t + D/2), as in Llama.
        base: of the frequencies base ** (-2t / D).
        fraction: the part of the head's channels that is rotated, the first ones.
        scaling: of frequencies, to contexts longer by ``factor``: ``linear`` (position
            interpolation), ``ntk`` (a larger base) or ``yarn`` (Peng et al., 2023).
        original: the length trained at, for ``yarn``.
    """

    names: ClassVar[dict[str, dict[str, Any]]] = {"rope": {}}

    layout: str = choice("interleaved", "interleaved", "half")
    base: float = number(10000.0, most=1e12)
    fraction: float = number(1.0, most=1.0)
    scaling: str | None = choice(None, "linear", "ntk", "yarn")
    factor: float | None = number(None)
    original: int | None = count(None, most=2**40)

    def _agree(self) -> None:
        if self.base <= 1.0:
            raise IrpeError(f"base={self.base:g} must be more than 1")
        if (self.scaling is None) != (self.factor is None):
            raise IrpeError(
                f"scaling={self.scaling} and factor={self.factor} go together, "
                "as in scaling=linear,factor=4"
            )
        if (self.scaling == "yarn") != (self.original is not None):
            raise IrpeError(
                f"original={self.original} does not go with scaling={self.scaling}: "
                "yarn needs it, as in scaling=yarn,factor=4,original=2048, and nothing else does"
            )
        if self.factor is not None and self.factor < 1.0:
            raise IrpeError(f"factor={self.factor:g} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeAxial(Spec):
    """Half of the channels rotated by one axis, half by the other (Heo et al., ECCV 2024).

    Args:
        layout: see ``Rope``. base: of the frequencies base ** (-4t / D).
        order: the axis of the first half: ``yx`` (rows first, as in timm) or ``xy`` (columns
            first, as in the authors' code).
    """

    names: ClassVar[dict[str, dict[str, Any]]] = {"rope-axial": {}}
    axes: ClassVar[tuple[int, ...]] = (2,)

    layout: str = choice("interleaved", "interleaved", "half")
    base: float = number(100.0, most=1e12)
    order: str = choice("yx", "yx", "xy")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeMixed(Spec):
    """Learned frequencies of both axes, for each head (Heo et al., ECCV 2024).

    Args:
        layout: see ``Rope``. base: frequencies start as base ** (-4t / D), in random directions.
    """

    names: ClassVar[dict[str, dict[str, Any]]] = {"rope-mixed": {}}
    axes: ClassVar[tuple[int, ...]] = (2,)

    layout: str = choice("interleaved", "interleaved", "half")
    base: float = number(10.0, most=1e12)
