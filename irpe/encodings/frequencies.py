"""Frequencies of rotary embeddings, float64 on the CPU: pure functions of a spec."""

import math

import torch
from torch import Tensor

from ..errors import IrpeError
from ..spec import Rope, RopeAxial


def rotated_channels(spec: Rope, head_dim: int) -> int:
    """R: how many of a head's channels are rotated.

    Raises:
        IrpeError: where this is no even number.
    """
    channels = spec.fraction * head_dim
    width = round(channels)
    if abs(channels - width) > 1e-6 * head_dim or width % 2 or width < 2:
        raise IrpeError(
            f"{spec} rotates {channels:g} of head_dim={head_dim} channels: "
            "an even number of at least 2 is needed"
        )
    return width


def rope_frequencies(spec: Rope, head_dim: int) -> tuple[Tensor, float]:
    """Radians per position ``[R / 2]``, and the factor of cosines and sines (1 but for YaRN)."""
    width = rotated_channels(spec, head_dim)
    base, factor = spec.base, spec.factor or 1.0
    if spec.scaling == "ntk":
        if width < 4:
            raise IrpeError(f"{spec}: scaling=ntk needs at least 4 rotated channels, not {width}")
        base *= factor ** (width / (width - 2))
    frequencies = _powers(base, width // 2)
    if spec.scaling == "linear":
        return frequencies / factor, 1.0
    if spec.scaling == "yarn":
        return _yarn(spec, frequencies, width)
    return frequencies, 1.0


def _powers(base: float, count: int) -> Tensor:
    """``base ** (-t / count)`` for t from 0."""
    return base ** (-torch.arange(count, dtype=torch.float64, device="cpu") / count)


def _yarn(spec: Rope, frequencies: Tensor, width: int) -> tuple[Tensor, float]:
    """Peng et al. (2023): slow planes are interpolated, fast ones stay, a ramp lies between."""
    assert spec.factor is not None and spec.original is not None
    original = spec.original

    def plane(turns: float) -> float:
        """The plane that turns so often over the original length."""
        return width * math.log(original / (2 * math.pi * turns)) / (2 * math.log(spec.base))

    low, high = max(math.floor(plane(32.0)), 0), min(math.ceil(plane(1.0)), width - 1)
    span = high - low if high > low else 1e-3
    t = torch.arange(width // 2, dtype=torch.float64, device="cpu")
    slow = ((t - low) / span).clamp(0.0, 1.0)
    frequencies = frequencies * ((1 - slow) + slow / spec.factor)
    return frequencies, 0.1 * math.log(spec.factor) + 1.0


def axial_frequencies(spec: RopeAxial, head_dim: int) -> Tensor:
    """Radians per row and per column ``[2, D / 2]``; each plane turns by one of them."""
    if head_dim % 4:
        raise IrpeError(f"{spec} needs a head_dim that is a multiple of 4, not {head_dim}")
    powers = _powers(spec.base, head_dim // 4)
    none = torch.zeros_like(powers)
    first, second = torch.cat((powers, none)), torch.cat((none, powers))
    return torch.stack((first, second) if spec.order == "yx" else (second, first))


def mixed_frequencies(base: float, head_dim: int, num_heads: int) -> Tensor:
    """Where the learned ones of ``rope-mixed`` start, ``[2, H, D / 2]``: directions are random.

    Each head draws an angle; half of its planes look that way, half at a right angle to it.
    """
    powers = _powers(base, head_dim // 4)
    angle = torch.rand(num_heads, 1, dtype=torch.float64, device="cpu") * 2 * math.pi
    turned = angle + math.pi / 2
    rows = torch.cat((powers * angle.sin(), powers * turned.sin()), -1)
    columns = torch.cat((powers * angle.cos(), powers * turned.cos()), -1)
    return torch.stack((rows, columns))
