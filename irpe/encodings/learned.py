"""A learned vector for each position, added at a model's input. ``x + p[i]``.

::

    learned,length=512
    learned,length=512,interpolate=left,to=2048

Source: Gehring et al., Convolutional Sequence to Sequence Learning, 2017; BERT.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import IrpeError
from ..fields import choice, count
from ..geometry import Geometry
from ..spec import LayerSize, Spec
from .base import Encoding, register
from .sinusoidal import check_one_axis

ANCHORS = ("left", "corners", "half_pixel")


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Learned(Spec):
    """A learned vector for each position, added at a model's input.

    Args:
        length: number of positions in the table, from 0.
        interpolate: ``left``, ``corners`` or ``half_pixel``: how the table is interpolated to
            ``to`` positions, see ``irpe.interpolate``.
        to: number of positions after interpolation.
    """

    names = {"learned": {}}
    at_input = True
    examples = (("learned,length=512", "x + p[i]", "at the model's input"),)

    length: int = count(512, always=True)
    interpolate: str | None = choice(None, *ANCHORS)
    to: int | None = count(None)

    def check(self) -> None:
        if (self.interpolate is None) != (self.to is None):
            raise IrpeError(
                f"interpolate={self.interpolate} and to={self.to}: give both or none, "
                "as in interpolate=left,to=2048"
            )
        if self.to is not None and self.to < self.length:
            raise IrpeError(f"to={self.to} is less than length={self.length}")

    def build(self, size: LayerSize) -> dict[str, Encoding]:
        return {"learned": LearnedEmbedding(self, size)}


class LearnedEmbedding(Encoding):
    """A table of vectors added to the tokens at a model's input; prefix tokens get none.

    Parameters:
        weight ``[length, C]``, normal with standard deviation 0.02 at first.
    """

    spec: Learned

    def __init__(self, spec: Learned, size: LayerSize) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.length, size.dim, **size.made))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table; call it after ``to_empty`` if it was built on the meta device."""
        nn.init.normal_(self.weight, std=0.02)

    def table(self) -> Tensor:
        """Return the rows of all positions, interpolated if the spec has ``interpolate``."""
        if self.spec.interpolate is None or self.spec.to is None:
            return self.weight
        return interpolate(self.weight, self.spec.to, self.spec.interpolate)

    def embed(self, x: Tensor, geometry: Geometry) -> Tensor:
        check_one_axis(self.spec, geometry)
        self._check(geometry)
        geometry.check(x.shape[0], x.shape[1])
        positions = geometry.positions(x.device)[0].squeeze(-1)
        rows = F.embedding(positions, self.table()).to(x.dtype)
        return x + F.pad(rows, (0, 0, geometry.prefix, 0))

    def _check(self, geometry: Geometry) -> None:
        size, given = self.spec.to or self.spec.length, geometry.readable()
        least, most = 0, geometry.query_length - geometry.prefix - 1
        if given is not None:
            query = given[0]
            if query.is_floating_point():
                raise IrpeError(f"{self.spec} needs integer positions, not {query.dtype}")
            if query.numel():
                least, most = geometry.remember(
                    "bounds", lambda: (int(query.min()), int(query.max()))
                )
        elif geometry.explicit or torch.jit.is_tracing():
            return
        if least < 0 or most >= size:
            raise IrpeError(
                f"{self.spec} has rows for positions 0 to {size - 1}, but the input has positions "
                f"{least} to {most}: interpolate it, as in "
                f"learned,length={self.spec.length},interpolate=left,to={max(most + 1, size)}"
            )


def interpolate(table: Tensor, length: int, anchor: str = "left") -> Tensor:
    """Return a table of positions for a longer input, by linear interpolation of its rows.

    Args:
        table: ``[N, C]``; differentiable.
        length: number of rows of the result, at least N.
        anchor: the position of new row p in the old table, with M = length / N:

            - ``left``: p / M. Old row n becomes row M n; the last old row is repeated at the end.
            - ``corners``: p (N - 1) / (length - 1). The first and last rows stay.
            - ``half_pixel``: (p + 1/2) / M - 1/2, as in image resizing.

    Returns:
        ``[length, C]``, dtype of the table.

    Raises:
        IrpeError: if the anchor is unknown, or length is less than N.
    """
    if not isinstance(table, Tensor) or table.dim() != 2 or not table.is_floating_point():
        shape = list(table.shape) if isinstance(table, Tensor) else table
        raise IrpeError(f"a table of positions is a floating point [N, C], not {shape!r}")
    rows = table.shape[0]
    if anchor not in ANCHORS:
        raise IrpeError(f"anchor={anchor!r} is not one of {', '.join(ANCHORS)}")
    if length < rows:
        raise IrpeError(f"length={length} is less than the {rows} rows of the table")
    if length == rows:
        return table
    p = torch.arange(length, device=table.device, dtype=torch.int64)
    # Integer numerators over ``whole``, so that rows that stay are exact.
    match anchor:
        case "left":
            place, whole = p * rows, length
        case "corners":
            place, whole = p * (rows - 1), length - 1
        case _:
            place, whole = ((2 * p + 1) * rows - length).clamp(min=0), 2 * length
    first = place // whole
    second = (first + 1).clamp(max=rows - 1)
    wide = torch.promote_types(table.dtype, torch.float32)
    part = ((place % whole).to(wide) / whole).unsqueeze(-1)
    return torch.lerp(table[first].to(wide), table[second].to(wide), part).to(table.dtype)
