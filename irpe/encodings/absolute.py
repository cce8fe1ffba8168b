"""Absolute embeddings: sinusoids, learned tables, and how a table is stretched to longer inputs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import IrpeError
from ..geometry import Geometry
from ..spec import PIA, Learned, Sinusoidal
from .base import Encoding

ANCHORS = ("left", "corners", "half_pixel")


def sinusoids(positions: Tensor, dim: int, form: str, base: float, dtype: torch.dtype) -> Tensor:
    """Sinusoids ``[..., L, C]`` of positions ``[..., L]``, integers or fractions.

    Args:
        dim: C. form: ``paper`` (sine and cosine by turns) or ``fairseq`` (sines, then cosines; an
            odd last channel is 0). base: of the frequencies, see ``irpe.Sinusoidal``.
    """
    wide = torch.float32 if positions.device.type == "mps" else torch.float64
    planes = (dim + 1) // 2 if form == "paper" else dim // 2
    span = dim / 2 if form == "paper" else max(planes - 1, 1)
    t = torch.arange(planes, dtype=wide, device=positions.device)
    angles = positions.to(wide).unsqueeze(-1) * base ** (-t / span)
    if form == "paper":
        waves = torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)[..., :dim]
    else:
        waves = torch.cat((angles.sin(), angles.cos()), -1)
        waves = F.pad(waves, (0, dim - 2 * planes))
    return waves.to(dtype)


def stretch(table: Tensor, length: int, anchor: str = "left") -> Tensor:
    """A table of positions for a longer input, by linear interpolation of its rows.

    Args:
        table: ``[N, C]``; what it gives is differentiable in it.
        length: rows wanted, at least N; with M = length / N, row p of the new table lies at

            - ``left``: p / M, so that every row of the old one stays at M times its place; past
              the last row there is nothing to interpolate with, and that row is repeated;
            - ``corners``: p (N - 1) / (length - 1), so that both ends stay;
            - ``half_pixel``: (p + 1/2) / M - 1/2, as images are resized.

    Returns:
        ``[length, C]`` of the table's dtype.

    Raises:
        IrpeError: for an unknown anchor, or a length below N.
    """
    if not isinstance(table, Tensor) or table.dim() != 2 or not table.is_floating_point():
        shape = list(table.shape) if isinstance(table, Tensor) else table
        raise IrpeError(f"a table of positions is [N, C] of floating point, not {shape!r}")
    rows = table.shape[0]
    if anchor not in ANCHORS:
        raise IrpeError(f"anchor={anchor!r} is not one of {', '.join(ANCHORS)}")
    if length < rows:
        raise IrpeError(f"length={length} is less than the {rows} rows of the table")
    if length == rows:
        return table
    p = torch.arange(length, device=table.device, dtype=torch.int64)
    # Places as whole numbers of 1 / whole, so that rows that stay, stay exactly.
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


class SinusoidalEmbedding(Encoding):
    """Sinusoids added to the tokens at a model's input; prefix tokens get none."""

    def __init__(self, spec: Sinusoidal, dim: int) -> None:
        super().__init__()
        self.spec, self.dim = spec, dim

    def embed(self, x: Tensor, geometry: Geometry) -> Tensor:
        on_x, _ = waves(self.spec, self.dim, geometry, x)
        geometry.check(x.shape[0], x.shape[1])
        return x + on_x

    def extra_repr(self) -> str:
        return f"{self.spec}, dim={self.dim}"


class LearnedEmbedding(Encoding):
    """A table of vectors added to the tokens at a model's input; prefix tokens get none.

    Parameters:
        weight ``[length, C]``, drawn from N(0, 0.02).
    """

    def __init__(
        self,
        spec: Learned,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.length, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table, after construction on the meta device as well."""
        nn.init.normal_(self.weight, std=0.02)

    def table(self) -> Tensor:
        """The rows of all positions that are served, stretched where the spec says so."""
        if self.spec.stretch is None or self.spec.to is None:
            return self.weight
        return stretch(self.weight, self.spec.to, self.spec.stretch)

    def embed(self, x: Tensor, geometry: Geometry) -> Tensor:
        _check_one_axis(self.spec, geometry)
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
                f"{least} to {most}: stretch it, as in "
                f"learned,length={self.spec.length},stretch=left,to={max(most + 1, size)}"
            )

    def extra_repr(self) -> str:
        return f"{self.spec}, dim={self.weight.shape[1]}"


class PositionInfused(Encoding):
    """Sinusoids in what enters the query and the key projection, never in values (PIA).

    Layer inputs so carry no position, and can be cached and placed anew: where keys are cached
    tokens, the geometry says the positions they have now.
    """

    def __init__(self, spec: PIA, dim: int) -> None:
        super().__init__()
        self.spec, self.dim = spec, dim

    def waves(self, geometry: Geometry, like: Tensor) -> tuple[Tensor, Tensor]:
        """What joins the inputs of queries ``[1 | B, L, C]`` and keys ``[1 | B, S, C]``.

        Of the dtype and device of a tensor ``like`` that. A projection is linear, so a cache may
        keep projected inputs and add projected waves: Wk (y + p) = Wk y + Wk p.
        """
        return waves(self.spec, self.dim, geometry, like)

    def inputs(self, xq: Tensor, xk: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        on_q, on_k = self.waves(geometry, xq)
        geometry.check(xq.shape[0], xq.shape[1], xk.shape[1])
        return xq + on_q, xk + on_k

    def extra_repr(self) -> str:
        return f"{self.spec}, dim={self.dim}"


def waves(
    spec: Sinusoidal | PIA, dim: int, geometry: Geometry, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Sinusoids of queries ``[(B,) L, C]`` and keys ``[(B,) S, C]``; made once for a geometry."""
    _check_one_axis(spec, geometry)

    def build() -> tuple[Tensor, Tensor]:
        def side(positions: Tensor, prefix: int) -> Tensor:
            made = sinusoids(positions.squeeze(-1), dim, spec.form, spec.base, like.dtype)
            return F.pad(made, (0, 0, prefix, 0))

        query, key = geometry.positions(like.device)
        on_q = side(query, geometry.prefix)
        alike = key is query and geometry.key_prefix == geometry.prefix
        return on_q, on_q if alike else side(key, geometry.key_prefix)

    key = ("waves", spec.form, spec.base, dim, like.device, like.dtype)
    made: tuple[Tensor, Tensor] = geometry.remember(key, build)
    return made


def _check_one_axis(spec: Learned | Sinusoidal | PIA, geometry: Geometry) -> None:
    if not isinstance(geometry, Geometry):
        raise IrpeError(f"geometry={geometry!r} is not a geometry: make an irpe.Sequence")
    if geometry.axes != 1:
        raise IrpeError(f"{spec} needs positions on one axis, but {geometry!r} has {geometry.axes}")
