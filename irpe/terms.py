"""What an encoding hands to attention: all that encodings and backends share.

Shapes: B batch, H heads, L queries, S keys, D head dim, N buckets. ``n(i, j)`` is the bucket of
query i and key j. With q scaled, the logits and the output are::

    logits[i, j] = gain[n] * (q_i . k_j) + bias[n] + q_i . query[:, n] + scale * k_j . key[:, n]
    out[i]       = sum_j P[i, j] * (v_j + value[n])
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .buckets import BucketIds

Kind = Literal["bias", "query", "key", "value", "gain"]
LOGIT_KINDS: tuple[Kind, ...] = ("bias", "query", "key", "gain")


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One table and the buckets that index it.

    Args:
        kind: where the table acts, see the formula above.
        table: ``[H | 1, N]`` for bias and gain, ``[H | 1, D, N]`` for query and key (the table
            that meets the query, or the key), ``[H | 1, N, D]`` for value.
        buckets: n(i, j). A key term needs ``by_key`` buckets, a query and a value term the others.
    """

    kind: Kind
    table: Tensor
    buckets: BucketIds
