"""The four methods of Huang et al.: tables that scale q . k or are added to it.

::

    huang1,clip=64      logit * a[clip(|i - j|)]
    huang2,clip=64      logit * a[clip(i - j)]
    huang3,clip=64      s sum_c q_c k_c a_c[clip(i - j)]
    huang4,clip=64      logit + s q . r[clip(i - j)] + s k . r[clip(i - j)]

Source: Huang et al., Improve Transformer Models with Better Relative Position Embeddings, 2020,
arXiv 2009.13658.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ..buckets import ClipBuckets
from ..fields import count, flag
from ..geometry import Geometry
from ..spec import LayerSize, Spec
from ..terms import Term
from .base import Encoding, TableEncoding, register


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Huang(Spec):
    """The four methods of Huang et al. (2020, arXiv 2009.13658).

    Args:
        method: 1: a scale of q . k per distance; 2: a scale per signed distance; 3: a scale per
            channel and signed distance; 4: the dot products of a vector with q and with k are
            added.
        clip: distances of at least ``clip`` share a bucket.
        shared: one table for all heads, or one for each head.
    """

    names = {f"huang{n}": {"method": n} for n in (1, 2, 3, 4)}
    neutral = True
    examples = (
        ("huang1,clip=64", "logit * a[clip(|d|)]", "a number for each distance"),
        ("huang2,clip=64", "logit * a[clip(d)]", "for each signed distance"),
        ("huang3,clip=64", "s sum_c q_c k_c a_c[clip(d)]", "a factor for each channel"),
        ("huang4,clip=64", "logit + s q . r[clip(d)] + s k . r[clip(d)]", "relative_key_query"),
    )

    method: int = count(4, most=4)
    clip: int = count(64, most=2**15, always=True)
    shared: bool = flag(True)

    def build(self, size: LayerSize) -> dict[str, Encoding]:
        return {"huang": HuangRPE(self, size)}


class HuangRPE(TableEncoding):
    """One table of one of the four methods.

    Parameters:
        table ``[H | 1, N]`` for methods 1 and 2, ``[H | 1, D, N]`` for method 3, initialised to
        ones; ``[H | 1, D, N]`` for method 4, initialised to zeros. So outputs stay the same.
    """

    spec: Huang

    def __init__(self, spec: Huang, size: LayerSize) -> None:
        super().__init__(spec, size, ClipBuckets(spec.clip, signed=spec.method != 1))
        heads, n = 1 if spec.shared else size.num_heads, self.num_buckets
        shape = (heads, n) if spec.method <= 2 else (heads, size.head_dim, n)
        self.table = nn.Parameter(torch.empty(shape, **size.made))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the table with ones or zeros; call it after ``to_empty`` on the meta device."""
        nn.init.constant_(self.table, 0.0 if self.spec.method == 4 else 1.0)

    def terms(self, geometry: Geometry) -> tuple[Term, ...]:
        buckets = self.buckets(geometry)
        if self.spec.method <= 3:
            return (Term("channels" if self.spec.method == 3 else "gain", self.table, buckets),)
        # A key term uses offsets key - query, so the table is mirrored.
        size = self.function.size
        mirrored = torch.cat((self.table[..., :size].flip(-1), self.table[..., size:]), -1)
        return Term("query", self.table, buckets), Term("key", mirrored, buckets)
