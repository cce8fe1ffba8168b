"""Decomposed relative positions: a vector for each row offset and one for each column offset.

::

    decomposed,size=64
    decomposed,size=14,width=20

``logit += q . (rows[y_i - y_j] + columns[x_i - x_j])``, with q not scaled by D ** -0.5. On a grid
of another size the tables are interpolated.

Source: Li et al., MViTv2, CVPR 2022, Eq. 4; as in ViTDet (Li et al., 2022) and SAM (Kirillov et
al., 2023).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..buckets import BucketIds, ImageBuckets
from ..buckets.steps import clip_index
from ..errors import IrpeError
from ..fields import count
from ..geometry import Geometry, Grid
from ..spec import LayerSize, Spec
from ..terms import Term
from .base import Encoding, register


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Decomposed(Spec):
    """Row and column vectors whose dot product with the query is added (Li et al., CVPR 2022).

    Args:
        size: rows of the grid of the tables.
        width: its columns; None: ``size``.
    """

    names = {"decomposed": {}}
    axes = (2,)
    neutral = True
    examples = (
        (
            "decomposed,size=14",
            "logit + q . (r[dy] + c[dx])",
            "image; SAM's and ViTDet's, no bucket",
        ),
    )

    size: int = count(14, most=2**16, always=True)
    width: int | None = count(None, most=2**16)

    def build(self, size: LayerSize) -> dict[str, Encoding]:
        return {"decomposed": RowsColumns(self, size)}


class RowsColumns(Encoding):
    """Two query terms.

    Parameters (initialised to zero), with SAM's names:
        rel_pos_h ``[2 size - 1, D]`` and rel_pos_w ``[2 width - 1, D]``, for all heads; row 0 is
        the most negative offset query - key.
    """

    spec: Decomposed

    def __init__(self, spec: Decomposed, size: LayerSize) -> None:
        super().__init__()
        self.spec = spec
        sides, dim = (spec.size, spec.width or spec.size), size.head_dim
        self.rel_pos_h, self.rel_pos_w = (
            nn.Parameter(torch.zeros(2 * side - 1, dim, **size.made)) for side in sides
        )

    def reset_parameters(self) -> None:
        """Zero the tables; call it after ``to_empty`` if they were built on the meta device."""
        for table in (self.rel_pos_h, self.rel_pos_w):
            nn.init.zeros_(table)

    def terms(self, geometry: Geometry) -> tuple[Term, ...]:
        if not isinstance(geometry, Grid):
            raise IrpeError(f"{self.spec} needs the size of a grid, not {geometry!r}")
        return decomposed_terms(self.rel_pos_h, self.rel_pos_w, geometry)


def decomposed_terms(rel_pos_h: Tensor, rel_pos_w: Tensor, grid: Grid) -> tuple[Term, ...]:
    """Return the query terms of two tables ``[2 size - 1, D]``, see ``RowsColumns``."""
    terms = []
    for name, table, side in (
        ("rows", rel_pos_h, grid.height),
        ("columns", rel_pos_w, grid.width),
    ):
        columns = resized(table, 2 * side - 1).t() * table.shape[1] ** 0.5
        if grid.prefix:  # nothing for pairs with a prefix token
            columns = nn.functional.pad(columns, (0, 1))
        buckets = BucketIds(ImageBuckets(name, clip_index(side - 1)), grid)
        terms.append(Term("query", columns.unsqueeze(0), buckets))
    return tuple(terms)


def resized(table: Tensor, size: int) -> Tensor:
    """Return a table interpolated to ``[size, D]``."""
    if table.shape[0] == size:
        return table
    return nn.functional.interpolate(table.t().unsqueeze(0), size=size, mode="linear")[0].t()
