"""Vectors of relative positions, added to keys and values.

``logit + s q . r[clip(i - j)]``, on kv also ``v + r'[clip(i - j)]``::

    shaw,clip=64
    shaw,clip=64,on=kv

Source: Shaw et al., Self-Attention with Relative Position Representations, 2018, arXiv 1803.02155.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..buckets import ClipBuckets
from ..fields import choice, count, flag
from ..geometry import Geometry
from ..spec import LayerSize, Spec
from ..terms import Term
from .base import Encoding, TableEncoding, register


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Shaw(Spec):
    """Vectors of relative positions (Shaw et al., 2018, arXiv 1803.02155).

    Args:
        clip: distances of at least ``clip`` share a vector; there are 2 clip + 1 vectors.
        on: ``k`` (vectors are added to keys) or ``kv`` (others are added to values too).
        shared: one table for all heads, or one for each head.
    """

    names = {"shaw": {}}
    neutral = True
    examples = (("shaw,clip=64", "logit + s q . r[clip(d)]", "with ,on=kv also v + r'[clip(d)]"),)

    clip: int = count(64, most=2**15, always=True)
    on: str = choice("k", "k", "kv")
    shared: bool = flag(True)

    def build(self, size: LayerSize) -> dict[str, Encoding]:
        return {"shaw": ShawRPE(self, size)}


class ShawRPE(TableEncoding):
    """Vectors of clipped offsets, added to keys and values.

    Parameters (initialised to zero):
        table_k ``[H | 1, D, N]``, multiplied with the query; with on=kv table_v ``[H | 1, N, D]``.
    """

    def __init__(self, spec: Shaw, size: LayerSize) -> None:
        super().__init__(spec, size, ClipBuckets(spec.clip))
        heads, n = 1 if spec.shared else size.num_heads, self.num_buckets
        self.table_k = nn.Parameter(torch.zeros(heads, size.head_dim, n, **size.made))
        self.table_v = None
        if spec.on == "kv":
            self.table_v = nn.Parameter(torch.zeros(heads, n, size.head_dim, **size.made))

    def terms(self, geometry: Geometry) -> tuple[Term, ...]:
        buckets = self.buckets(geometry)
        on_k = Term("query", self.table_k, buckets)
        table_v: Tensor | None = self.table_v
        return (on_k,) if table_v is None else (on_k, Term("value", table_v, buckets))
