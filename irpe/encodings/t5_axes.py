"""T5's bias for images and videos: the sum of a table of log-spaced buckets for each axis.

::

    t5-axes,buckets=32,max=128

``logit + b_y[h, n(y_i - y_j)] + b_x[h, n(x_i - x_j)]``, for videos also ``b_z`` of frames, with the
bidirectional buckets of ``t5``.

Source: Raffel et al., Exploring the Limits of Transfer Learning, 2020, arXiv 1910.10683, for the
buckets of an axis.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..buckets import BucketIds
from ..errors import IrpeError
from ..fields import count
from ..geometry import Geometry
from ..spec import LayerSize, Spec
from ..terms import Term
from .base import Encoding, register
from .t5 import T5, LogBuckets, log_buckets


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class T5Axes(Spec):
    """A bias for each head, axis and bucket of distances.

    Args:
        buckets: number of buckets of an axis, see ``T5``.
        max: distances of at least ``max`` share the last bucket.
    """

    names = {"t5-axes": {}}
    axes = (2, 3)
    neutral = True
    examples = (
        ("t5-axes,buckets=32,max=128", "logit + b[h, n(dy)] + b'[h, n(dx)]", "image; log-spaced"),
    )

    buckets: int = count(32, least=4, always=True)
    max: int = count(128, always=True)

    def check(self) -> None:
        T5(buckets=self.buckets, max=self.max, bidirectional=True)  # checks both

    def build(self, size: LayerSize) -> dict[str, Encoding]:
        if size.axes not in self.axes:
            raise IrpeError(f"axes={size.axes}: {self} takes positions of 2 or 3 numbers")
        return {"t5": AxesBias(self, size)}


@dataclass(frozen=True, slots=True)
class AxisBuckets:
    """T5's buckets of one axis of several.

    Args:
        buckets: the bucket function of the axis.
        axis: index of the axis.
    """

    buckets: LogBuckets
    axis: int

    @property
    def size(self) -> int:
        """Number of buckets, without the one of prefix tokens."""
        return self.buckets.size

    def __call__(self, offsets: Tensor) -> Tensor:
        """Return bucket ids int64 ``[...]`` of integer offsets ``[..., A]``, query - key."""
        return self.buckets(offsets[..., self.axis : self.axis + 1])


class AxesBias(Encoding):
    """A bias term of each axis.

    Parameters (initialised to zero):
        table ``[A, H, N]``: of frames (videos), rows and columns. Pairs with a prefix token have
        no bias.
    """

    spec: T5Axes

    def __init__(self, spec: T5Axes, size: LayerSize) -> None:
        super().__init__()
        self.spec = spec
        one = log_buckets(T5(buckets=spec.buckets, max=spec.max), True)
        self.functions = [AxisBuckets(one, axis) for axis in range(size.axes)]
        shape = (size.axes, size.num_heads, one.size)
        self.table = nn.Parameter(torch.zeros(shape, **size.made))

    def reset_parameters(self) -> None:
        """Zero the tables; call it after ``to_empty`` if they were built on the meta device."""
        nn.init.zeros_(self.table)

    def terms(self, geometry: Geometry) -> tuple[Term, ...]:
        axes = len(self.functions)
        if geometry.axes != axes:
            raise IrpeError(
                f"{self.spec} was built for {axes} axes, and {geometry!r} has {geometry.axes}: "
                f"build it with axes={geometry.axes}"
            )
        some = geometry.prefix or geometry.key_prefix  # no bias for pairs with a prefix token
        tables = nn.functional.pad(self.table, (0, 1)) if some else self.table
        return tuple(
            Term("bias", table, BucketIds(function, geometry))
            for table, function in zip(tables.unbind(0), self.functions, strict=True)
        )
