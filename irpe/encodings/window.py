"""Bias tables of windows, as in Swin: a scalar for each head and (row, column) offset.

Source: Liu et al., Swin Transformer, ICCV 2021, Eq. 4.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..buckets import BucketIds, ImageBuckets
from ..buckets.steps import clip_index
from ..errors import IrpeError
from ..geometry import Geometry, Grid
from ..terms import Term


@dataclass(frozen=True, slots=True)
class WindowBuckets:
    """A bucket for each offset in a window, row by row.

    Args:
        height: rows of the window.
        width: columns of the window.
        apart: whether pairs with a prefix token have two more buckets, as in BEiT.
    """

    height: int
    width: int
    apart: bool = False

    @property
    def size(self) -> int:
        """Number of buckets, without the one of pairs of prefix tokens."""
        return (2 * self.height - 1) * (2 * self.width - 1) + 2 * self.apart

    @property
    def opposite(self) -> str | None:
        """Id of the negated offset: "reversed" (size - 1 - id)."""
        return None if self.apart else "reversed"

    @property
    def prefix_ids(self) -> tuple[int, int] | None:
        """Ids of (a prefix token's query, a query's prefix key); None: the last bucket."""
        return (self.size - 2, self.size - 1) if self.apart else None

    def __call__(self, offsets: Tensor) -> Tensor:
        """Return bucket ids int64 ``[...]`` of integer offsets ``[..., 2]``, query - key."""
        rows, columns = offsets.unbind(-1)
        return (rows + self.height - 1) * (2 * self.width - 1) + columns + self.width - 1


def window_terms(
    table: Tensor, geometry: Geometry, window: tuple[int, int] | None = None
) -> tuple[Term, ...]:
    """Return the bias term of a table with a row for each offset in a window.

    Args:
        table: ``[N, H]`` with N = (2 height - 1) (2 width - 1), without bias for prefix tokens; or
            with three more rows, as in BEiT: prefix token to patch, patch to prefix token, prefix
            token to itself.
        geometry: positions in the window.
        window: its (height, width); None: those of the grid.
    """
    if not isinstance(geometry, Grid):
        raise IrpeError(f"a window bias needs the size of a grid, not {geometry!r}")
    grid = (geometry.height, geometry.width)
    height, width = window or grid
    if (height, width) != grid:
        raise IrpeError(
            f"the native relative bias is for {height}x{width} patches, and the images have "
            f"{grid[0]}x{grid[1]}: set the image size of the model (img_size=, set_input_size)"
        )
    apart = len(table) != (2 * height - 1) * (2 * width - 1)
    if geometry.prefix and not apart:
        table = F.pad(table, (0, 0, 0, 1))
    # Fused kernels split the buckets of a square window into rows and columns.
    square = ImageBuckets("product", clip_index(height - 1)) if height == width else None
    function = WindowBuckets(height, width, apart) if apart or square is None else square
    return (Term("bias", table.t(), BucketIds(function, geometry)),)
