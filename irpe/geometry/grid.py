"""Images: patches on a grid, row by row."""

import torch
from torch import Tensor

from ..errors import IrpeError
from .base import Geometry, check_size


class Grid(Geometry):
    """Patches of an image, row by row: token ``prefix + row * width + column``.

    Args:
        height, width: patches in a column and in a row (not pixels).
        prefix: class token and registers, before the patches.
        positions: integer (row, column) of the tokens there are, ``[L', 2]`` or ``[B, L', 2]``,
            where they are not the whole grid (patches dropped at random, images of several shapes
            in one batch).

    Raises:
        IrpeError: for sizes that are not positive, or positions of a wrong shape.
    """

    def __init__(
        self, height: int, width: int, prefix: int = 0, *, positions: Tensor | None = None
    ) -> None:
        check_size("height", height)
        check_size("width", width)
        self.height, self.width = height, width
        if positions is not None:
            super().__init__(positions, prefix=prefix)
            if positions.is_floating_point():
                raise IrpeError(f"positions on a grid are integers, not {positions.dtype}")
            if positions.shape[-1] != 2:
                raise IrpeError(
                    f"positions on a grid are (row, column), not {positions.shape[-1]} numbers"
                )
        else:
            self._query = self._key = None
            self._set_prefix(prefix, None)

    def select(self, indices: Tensor) -> "Grid":
        """The grid of the patches kept.

        Args:
            indices: ``[L']`` or ``[B, L']``, counted row by row without the prefix.
        """
        if self._query is not None:
            raise IrpeError("select() needs a whole grid; this one holds a selection already")
        if not isinstance(indices, Tensor) or indices.dim() not in (1, 2):
            shape = list(indices.shape) if isinstance(indices, Tensor) else indices
            raise IrpeError(f"indices are a tensor [L'] or [B, L'], not {shape!r}")
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise IrpeError(f"indices are integers, not {indices.dtype}")
        indices = indices.long()  # short ones have no floor, or no room for the position
        rows = torch.div(indices, self.width, rounding_mode="floor")
        positions = torch.stack((rows, indices - rows * self.width), dim=-1)
        return Grid(self.height, self.width, self.prefix, positions=positions)

    @property
    def whole(self) -> bool:
        """Whether all patches are there, row by row."""
        return self._query is None

    @property
    def axes(self) -> int:
        return 2

    def _count(self) -> int:
        return self.height * self.width

    def _made(self, device: torch.device) -> Tensor:
        rows = torch.arange(self.height, device=device).unsqueeze(1).expand(-1, self.width)
        columns = torch.arange(self.width, device=device).expand(self.height, -1)
        return torch.stack((rows, columns), dim=-1).flatten(0, 1)

    def __repr__(self) -> str:
        selected = "" if self._query is None else f", positions={list(self._query.shape)}"
        return f"Grid({self.height}, {self.width}, prefix={self.prefix}{selected})"
