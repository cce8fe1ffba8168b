"""One-dimensional encodings, and ALiBi, which counts distances on any axes.

::

    sinusoidal
    learned,length=512
    learned,length=512,stretch=left,to=2048
    shaw,clip=64
    shaw,clip=64,on=kv
    huang4,clip=64
    t5,buckets=32,max=128
    alibi
    pia
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import IrpeError
from .grammar import Spec, choice, count, flag, number


@dataclass(frozen=True, slots=True, kw_only=True)
class Sinusoidal(Spec):
    """Sinusoids added at a model's input.

    Args:
        form: ``paper`` (Vaswani et al., 2017: sine and cosine by turns, base ** (-2t / C)) or
            ``fairseq`` (all sines, then all cosines, base ** (-t / (C / 2 - 1))).
        base: of the frequencies.
    """

    names: ClassVar[dict[str, dict[str, Any]]] = {"sinusoidal": {}}
    at_input: ClassVar[bool] = True

    form: str = choice("paper", "paper", "fairseq")
    base: float = number(10000.0, most=1e12)


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned(Spec):
    """A learned vector for each position, added at a model's input.

    Args:
        length: positions in the table, 0 to length - 1.
        stretch: how the table is stretched ``to`` more positions, see ``irpe.stretch``: ``left``,
            ``corners`` or ``half_pixel``.
    """

    names: ClassVar[dict[str, dict[str, Any]]] = {"learned": {}}
    at_input: ClassVar[bool] = True

    length: int = count(512, always=True)
    stretch: str | None = choice(None, "left", "corners", "half_pixel")
    to: int | None = count(None)

    def _agree(self) -> None:
        if (self.stretch is None) != (self.to is None):
            raise IrpeError(
                f"stretch={self.stretch} and to={self.to} go together, as in stretch=left,to=2048"
            )
        if self.to is not None and self.to < self.length:
            raise IrpeError(f"to={self.to} is less than length={self.length}: nothing to stretch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shaw(Spec):
    """Vectors of relative positions (Shaw et al., 2018, arXiv 1803.02155).

    Args:
        clip: distances past this one share a vector: 2 clip + 1 of them.
        on: ``k`` (the vector joins the key) or ``kv`` (another one joins the value).
        shared: one table for all heads, or one for each.
    """

    names: ClassVar[dict[str, dict[str, Any]]] = {"shaw": {}}
    neutral: ClassVar[bool] = True

    clip: int = count(64, most=2**15, always=True)
    on: str = choice("k", "k", "kv")
    shared: bool = flag(True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Huang(Spec):
    """The four methods of Huang et al. (2020, arXiv 2009.13658).

    Args:
        method: what happens to q . k: 1 times a number for the distance, 2 times one for the
            signed distance, 3 a factor for each channel, 4 one vector meets both q and k.
        clip, shared: see ``Shaw``.
    """

    names: ClassVar[dict[str, dict[str, Any]]] = {f"huang{n}": {"method": n} for n in (1, 2, 3, 4)}
    neutral: ClassVar[bool] = True

    method: int = count(4, most=4)
    clip: int = count(64, most=2**15, always=True)
    shared: bool = flag(True)


@dataclass(frozen=True, slots=True, kw_only=True)
class T5(Spec):
    """A bias for each head and bucket of distances (Raffel et al., 2020, arXiv 1910.10683).

    Args:
        buckets: of all distances; half of them each way where both count. Half of those hold one
            distance, the rest grow with its logarithm.
        max: distances from this one on share the last bucket.
        bidirectional: whether later keys have buckets of their own; None: as the attention is,
            not if it is causal.
    """

    names: ClassVar[dict[str, dict[str, Any]]] = {"t5": {}}
    neutral: ClassVar[bool] = True

    buckets: int = count(32, least=2, always=True)
    max: int = count(128, always=True)
    bidirectional: bool | None = flag(None)

    def _agree(self) -> None:
        exact = self.buckets // (2 if self.bidirectional is False else 4)
        if self.buckets % 4 or self.max <= exact:
            raise IrpeError(
                f"buckets={self.buckets} and max={self.max} do not go together: buckets is a "
                f"multiple of 4, and max more than {exact}, the distances that have their own"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Alibi(Spec):
    """A penalty for distance, steeper from head to head (Press et al., ICLR 2022).

    Symmetric: keys before and after a query count alike, on a grid by their Euclidean distance.
    No parameters.

    Args:
        span: slopes of H heads are 2 ** (-span h / H), h = 1 to H.
    """

    names: ClassVar[dict[str, dict[str, Any]]] = {"alibi": {}}
    axes: ClassVar[tuple[int, ...]] = (1, 2)

    span: float = number(8.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PIA(Spec):
    """Position-infused attention (Press et al., 2021, arXiv 2012.15832).

    Sinusoids join what enters the query and the key projection in each layer, never the values.

    Args:
        form, base: see ``Sinusoidal``.
    """

    names: ClassVar[dict[str, dict[str, Any]]] = {"pia": {}}

    form: str = choice("fairseq", "paper", "fairseq")
    base: float = number(10000.0, most=1e12)
