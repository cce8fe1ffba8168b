"""Rotary position embedding of text. ``q R(i) . R(j) k``.

::

    rope
    rope,layout=half,base=500000,fraction=0.5,scaling=yarn,factor=4,original=4096
    rope,layout=half,base=500000,scaling=llama3,factor=8,original=8192

Source: Su et al., RoFormer, 2021, arXiv 2104.09864. Scaling: Peng et al., YaRN, 2023; Grattafiori
et al., Llama 3, 2024; Ding et al., LongRoPE, 2024.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import IrpeError
from ..fields import choice, count, number, numbers
from ..spec import LayerSize, Spec
from .base import Encoding, register
from .rotation import LAYOUTS, Rotary, powers

# The required and the optional options of each scaling.
SCALINGS = {
    "linear": ("factor", ""),
    "ntk": ("factor", ""),
    "dynamic": ("factor original", ""),
    "yarn": ("factor original", "attention_factor beta_fast beta_slow"),
    "llama3": ("factor original", "low_freq_factor high_freq_factor"),
    "longrope": ("original short_factor long_factor", "factor attention_factor"),
}
_OPTIONS = sorted({name for pair in SCALINGS.values() for part in pair for name in part.split()})


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Rope(Spec):
    """Rotary position embedding (Su et al., 2021, arXiv 2104.09864).

    Options of the scaling have the same names as in transformers' configurations.

    Args:
        layout: the pairs of channels: ``interleaved`` (2t, 2t + 1), as in the paper, or ``half``
            (t, t + D/2), as in Llama.
        base: base of the frequencies base ** (-2t / D).
        fraction: fraction of the channels that is rotated; the first channels are.
        scaling: scaling of the frequencies for longer contexts: ``linear`` (position
            interpolation), ``ntk`` (a larger base), ``dynamic`` (ntk with a base that increases
            with the length), ``yarn`` (Peng et al., 2023), ``llama3`` or ``longrope`` (Ding et al.,
            2024). With ``dynamic`` and ``longrope`` frequencies depend on the largest position, so
            the encoding is not relative.
        factor: factor of the scaling, at least 1.
        original: the training length; for ``dynamic``, ``yarn``, ``llama3`` and ``longrope``.
        attention_factor: factor of cosines and sines; for ``yarn`` and ``longrope``. None: as in
            the paper.
        beta_fast: ``yarn`` keeps frequencies of at least this many turns over the original length.
        beta_slow: ``yarn`` divides frequencies of fewer turns by the factor.
        low_freq_factor: ``llama3`` divides frequencies of fewer turns by the factor.
        high_freq_factor: ``llama3`` keeps frequencies of at least this many turns.
        short_factor: R / 2 divisors of the frequencies up to the original length; ``longrope``.
        long_factor: R / 2 divisors for longer texts; ``longrope``.
    """

    names = {"rope": {}}
    examples = (("rope", "q R(i) . R(j) k", "rotations by position"),)

    layout: str = choice("interleaved", *LAYOUTS)
    base: float = number(10000.0, most=1e12)
    fraction: float = number(1.0, most=1.0)
    scaling: str | None = choice(None, *SCALINGS)
    factor: float | None = number(None)
    original: int | None = count(None, most=2**40)
    attention_factor: float | None = number(None)
    beta_fast: float | None = number(None)
    beta_slow: float | None = number(None)
    low_freq_factor: float | None = number(None)
    high_freq_factor: float | None = number(None)
    short_factor: tuple[float, ...] | None = numbers(None)
    long_factor: tuple[float, ...] | None = numbers(None)

    def check(self) -> None:
        if self.base <= 1.0:
            raise IrpeError(f"base={self.base:g} must be more than 1")
        needed, optional = (x.split() for x in SCALINGS.get(self.scaling or "", ("", "")))
        for name in _OPTIONS:
            value = getattr(self, name)
            if (value is None and name in needed) or (
                value is not None and name not in (*needed, *optional)
            ):
                what = f"needs {' and '.join(needed)}" if needed else "takes no options"
                what += f" and takes {', '.join(optional)}" if optional else ""
                raise IrpeError(
                    f"{name}={value} is not allowed with scaling={self.scaling}, which {what}: "
                    "as in scaling=yarn,factor=4,original=2048"
                )
        if self.factor is not None and self.factor < 1.0:
            raise IrpeError(f"factor={self.factor:g} must be at least 1")
        by_paper = self.scaling == "longrope" and self.attention_factor is None
        if by_paper and (self.factor is None or self.original == 1):
            raise IrpeError("scaling=longrope needs attention_factor, or factor and original=2")
        slow, fast = self._turns
        if slow >= fast:
            raise IrpeError(
                f"{slow:g} turns of low frequencies must be below {fast:g} of high ones"
            )

    def build(self, size: LayerSize) -> dict[str, Encoding]:
        return {"rope": Rotary(self, size)}

    def rotated(self, head_dim: int) -> int:
        """Return R, the number of rotated channels of a head; raise IrpeError if it is odd."""
        channels = self.fraction * head_dim
        width = round(channels)
        if abs(channels - width) > 1e-6 * head_dim or width % 2 or width < 2:
            raise IrpeError(
                f"{self} rotates {channels:g} of head_dim={head_dim} channels: "
                "an even number of at least 2 is needed"
            )
        return width

    @property
    def by_length(self) -> bool:
        """Whether frequencies depend on the largest position."""
        return self.scaling in ("dynamic", "longrope")

    @property
    def _turns(self) -> tuple[float, float]:
        """Turns over the original length of slow and fast frequencies."""
        if self.scaling == "llama3":
            return self.low_freq_factor or 1.0, self.high_freq_factor or 4.0
        return self.beta_slow or 1.0, self.beta_fast or 32.0

    def frequencies(self, head_dim: int, length: Tensor | None = None) -> tuple[Tensor, float]:
        """Return radians per position ``[1, R / 2]``, and the factor of cosines and sines.

        Args:
            head_dim: D.
            length: the largest position plus 1, a scalar; None: at most ``original``.
        """
        width, factor, original = self.rotated(head_dim), self.factor or 1.0, self.original or 1
        found = powers(self.base, width // 2)
        turns = found * (original / (2 * math.pi))
        slow, fast = self._turns
        scale = self.attention_factor or 1.0
        if self.scaling in ("ntk", "dynamic") and width < 4:
            raise IrpeError(f"{self}: scaling={self.scaling} needs 4 channels or more, not {width}")
        match self.scaling:
            case "linear":
                found = found / factor
            case "ntk":
                found = powers(self.base * factor ** (width / (width - 2)), width // 2)
            case "dynamic" if length is not None:
                grown = (factor * (length / original).clamp(min=1.0) - (factor - 1)).log()
                steps = torch.arange(width // 2, dtype=torch.float64, device=length.device)
                found = found.to(length.device) * (-2 * grown * steps / (width - 2)).exp()
            case "yarn":
                first, last = (  # planes to blend
                    width * math.log(original / (2 * math.pi * n)) / (2 * math.log(self.base))
                    for n in (fast, slow)
                )
                low, high = max(math.floor(first), 0), min(math.ceil(last), width - 1)
                planes = torch.arange(width // 2, dtype=torch.float64, device="cpu")
                share = ((planes - low) / (high - low if high > low else 1e-3)).clamp(0.0, 1.0)
                found = found * ((1 - share) + share / factor)
                scale = self.attention_factor or 0.1 * math.log(factor) + 1.0
            case "llama3":
                share = ((turns - slow) / (fast - slow)).clamp(0.0, 1.0)
                found = found * (share + (1 - share) / factor)
            case "longrope":
                found = self._longrope(found, length)
                if self.attention_factor is None and factor > 1.0:
                    scale = math.sqrt(1 + math.log(factor) / math.log(original))
        return found.unsqueeze(0), scale

    def _longrope(self, found: Tensor, length: Tensor | None) -> Tensor:
        assert self.short_factor is not None and self.long_factor is not None
        for name in ("short_factor", "long_factor"):
            given = len(getattr(self, name))
            if given != len(found):
                raise IrpeError(f"{name} has {given} numbers, but {len(found)} pairs are rotated")
        short, long = (
            found / torch.tensor(divisors, dtype=torch.float64, device="cpu")
            for divisors in (self.short_factor, self.long_factor)
        )
        if length is None:
            return short
        short, long = short.to(length.device), long.to(length.device)
        return torch.where(length > (self.original or 1), long, short)
