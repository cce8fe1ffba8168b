"""Rotary position embeddings as modules: 1D, and 2D with fixed or learned frequencies.

An angle is a position times a frequency, summed over axes; one product for all of them.
"""

import torch
from torch import Tensor, nn

from ..errors import IrpeError
from ..geometry import Geometry
from ..spec import Rope, RopeAxial, RopeMixed
from .base import Encoding
from .frequencies import axial_frequencies, mixed_frequencies, rope_frequencies
from .rotation import rotate


class Rotary(Encoding):
    """Queries and keys rotated by their positions (Su et al., 2021; Heo et al., 2024).

    It has no buffers: tables are made in float32 or better from the positions, once for a
    geometry and all layers. Prefix tokens are not rotated.

    Args:
        spec: ``Rope`` or ``RopeAxial``. head_dim: D.
    """

    def __init__(self, spec: Rope | RopeAxial, head_dim: int) -> None:
        super().__init__()
        self.spec, self.head_dim = spec, head_dim
        self._made()  # raises what there is to raise

    def _made(self) -> tuple[Tensor, float]:
        """Frequencies ``[A, R / 2]``, float64, and the factor of cosines and sines."""
        if isinstance(self.spec, Rope):
            frequencies, factor = rope_frequencies(self.spec, self.head_dim)
            return frequencies.unsqueeze(0), factor
        return axial_frequencies(self.spec, self.head_dim), 1.0

    def tables(self, geometry: Geometry, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of queries and of keys, ``[2, ..., L, R / 2]`` and with S.

        Float64 for a tensor ``like`` that, float32 for all others.
        """
        check_axes(self.spec, geometry)
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32

        def build() -> tuple[Tensor, Tensor]:
            frequencies, factor = self._made()
            wide = torch.float32 if like.device.type == "mps" else torch.float64
            return laid_out(geometry, frequencies.to(like.device, wide), factor, dtype)

        key = ("rotary", self.spec, self.head_dim, like.device, dtype)
        tables: tuple[Tensor, Tensor] = geometry.remember(key, build)
        return tables

    def transform(self, q: Tensor, k: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        if q.shape[-1] != self.head_dim:
            raise IrpeError(f"{self.spec} was built for head_dim={self.head_dim}, not {q.shape}")
        (cos_q, sin_q), (cos_k, sin_k) = (t.unbind(0) for t in self.tables(geometry, q))
        layout = self.spec.layout
        return rotate(q, cos_q, sin_q, layout), rotate(k, cos_k, sin_k, layout)

    def extra_repr(self) -> str:
        return f"{self.spec}, head_dim={self.head_dim}"


class MixedRotary(Encoding):
    """Learned frequencies along both axes for each head (Heo et al., ECCV 2024).

    Parameters:
        frequencies ``[2, H, D / 2]``: radians per row and per column. They do not decay.
    """

    decays = False

    def __init__(
        self,
        spec: RopeMixed,
        head_dim: int,
        num_heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if head_dim % 4:
            raise IrpeError(f"{spec} needs a head_dim that is a multiple of 4, not {head_dim}")
        self.spec = spec
        shape = (2, num_heads, head_dim // 2)
        self.frequencies = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the directions, after construction on the meta device as well."""
        _, heads, planes = self.frequencies.shape
        if not self.frequencies.is_meta:
            with torch.no_grad():
                self.frequencies.copy_(mixed_frequencies(self.spec.base, 2 * planes, heads))

    def transform(self, q: Tensor, k: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        check_axes(self.spec, geometry)
        _, heads, planes = self.frequencies.shape
        for name, x in (("q", q), ("k", k)):
            if x.shape[1] != heads or x.shape[-1] != 2 * planes:
                raise IrpeError(
                    f"{self.spec} was built for {heads} heads of {2 * planes} channels, "
                    f"but {name} is {list(x.shape)}"
                )
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        per_head = self.frequencies.transpose(0, 1).to(dtype)
        on_q, on_k = laid_out(geometry, per_head, 1.0, dtype)
        layout = self.spec.layout
        return rotate(q, on_q[0], on_q[1], layout), rotate(k, on_k[0], on_k[1], layout)

    def extra_repr(self) -> str:
        return f"{self.spec}, frequencies={list(self.frequencies.shape)}"


def laid_out(
    geometry: Geometry, frequencies: Tensor, factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, ``[2, L, R / 2]``, ``[2, H, L, R / 2]`` or ``[2, B, 1 | H, L, R / 2]``.

    Angles are computed in the frequencies' dtype, ``[A, R / 2]`` or ``[H, A, R / 2]``.
    """
    query, key = geometry.positions(frequencies.device)
    on_q = _cos_sin(query, geometry.prefix, frequencies, factor, dtype)
    if key is query and geometry.key_prefix == geometry.prefix:
        return on_q, on_q
    return on_q, _cos_sin(key, geometry.key_prefix, frequencies, factor, dtype)


def _cos_sin(
    positions: Tensor, prefix: int, frequencies: Tensor, factor: float, dtype: torch.dtype
) -> Tensor:
    if positions.dim() == 3:
        positions = positions.unsqueeze(1)  # [B, 1, L, A]
    # A sum over axes and no product of matrices, which autocast would round.
    turned = positions.to(frequencies.dtype).unsqueeze(-1) * frequencies.unsqueeze(-3)
    angles = nn.functional.pad(turned.sum(-2), (0, 0, prefix, 0))
    return (torch.stack((angles.cos(), angles.sin())) * factor).to(dtype)


def check_axes(spec: Rope | RopeAxial | RopeMixed, geometry: Geometry) -> None:
    """Raises IrpeError for positions with another number of axes than the encoding's."""
    if not isinstance(geometry, Geometry):
        raise IrpeError(f"geometry={geometry!r} is not a geometry: make an irpe.Sequence or Grid")
    if geometry.axes not in spec.axes:
        other = "rope" if geometry.axes == 1 else "rope-axial or rope-mixed"
        raise IrpeError(
            f"{spec} needs positions on {spec.axes[0]} axes, but {geometry!r} has "
            f"{geometry.axes}: {other} would do"
        )
