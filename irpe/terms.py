"""Terms: the interface between encodings and attention.

Shapes: B batch, H heads, L queries, S keys, D head dim, E channels of values, N buckets.
``n(i, j)`` is the bucket of query i and key j, ``far(i, j)`` their distance. With q scaled, the
logits and the output are::

    content[i, j] = sum_c channels[c, n] * q_ic * k_jc         (without such a term: q_i . k_j)
    logits[i, j]  = gain[n] * content[i, j]
                    + bias[n] + slope * far + q_i . query[:, n] + scale * k_j . key[:, n]
    out[i]        = sum_j P[i, j] * (v_j + value[n])
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .buckets import BucketIds
from .errors import IrpeError

Kind = Literal["bias", "slope", "query", "key", "value", "gain", "channels"]


@dataclass(frozen=True, slots=True)
class KindRules:
    """Rules of a kind of term.

    Args:
        shape: axes of the table after the heads: N buckets, D or E channels, or 1.
        by_key: whether the buckets are by key; None: the term's argument decides.
        in_bias: whether the term can be expressed as an additive bias.
    """

    shape: str
    by_key: bool | None
    in_bias: bool


KINDS: dict[str, KindRules] = {
    "bias": KindRules("N", None, True),
    "slope": KindRules("1", False, True),
    "query": KindRules("DN", False, True),
    "key": KindRules("DN", True, True),
    "value": KindRules("NE", False, False),
    "gain": KindRules("N", None, False),
    "channels": KindRules("DN", False, False),
}


class Term:
    """A table, its role in attention, and the buckets that index it.

    Several terms of a kind are added; gains and channels are multiplied.

    Args:
        kind: role of the table, see the formula above.
        table: ``[H | 1, N]`` for bias and gain (a scale per bucket), ``[H | 1, D, N]`` for query,
            key and channels (a scale per channel and bucket), ``[H | 1, N, E]`` for value,
            ``[H | 1, 1]`` for slope (in any floating-point dtype: products with distances are
            computed in float32 or better).
        buckets: n(i, j).
        by_key: for bias and gain only: whether n(i, j) is the bucket of the offset key - query
            instead of query - key. Key terms always use key - query, other kinds query - key.

    Raises:
        IrpeError: if the kind is unknown, the shape of the table is wrong, or the kind does not
            allow by_key.
    """

    __slots__ = ("buckets", "kind", "table")

    def __init__(
        self, kind: Kind, table: Tensor, buckets: BucketIds, *, by_key: bool | None = None
    ) -> None:
        rules = KINDS.get(kind) if isinstance(kind, str) else None
        if rules is None:
            raise IrpeError(f"unknown kind of term {kind!r}: it is one of {', '.join(KINDS)}")
        if not isinstance(buckets, BucketIds):
            raise IrpeError(f"buckets are irpe.BucketIds, not {type(buckets).__name__}")
        if not isinstance(table, Tensor) or not table.is_floating_point():
            found = table.dtype if isinstance(table, Tensor) else type(table).__name__
            raise IrpeError(f"the {kind} table is a floating point tensor, not {found}")
        if rules.by_key is not None and by_key not in (None, rules.by_key):
            raise IrpeError(
                f"by_key={by_key} is not allowed for a {kind} term: its buckets are always by "
                f"{'key' if rules.by_key else 'query'}"
            )
        sizes = {"N": buckets.size, "1": 1}
        if table.dim() != 1 + len(rules.shape) or any(
            size != sizes.get(axis, size)
            for axis, size in zip(rules.shape, table.shape[1:], strict=True)
        ):
            wanted = ", ".join(("H | 1", *rules.shape))
            raise IrpeError(
                f"the {kind} table is [{wanted}] with N={buckets.size} buckets, "
                f"not {list(table.shape)}"
            )
        self.kind, self.table = kind, table
        said = by_key if rules.by_key is None else rules.by_key
        self.buckets = buckets if said is None else buckets.oriented(said)

    def with_table(self, table: Tensor) -> "Term":
        """Return the same term with another table, such as a cast one."""
        return Term(self.kind, table, self.buckets)

    def __repr__(self) -> str:
        return f"Term({self.kind}, {list(self.table.shape)}, {self.buckets.geometry!r})"
