"""What an encoding hands to attention: all that encodings and backends share.

Shapes: B batch, H heads, L queries, S keys, D head dim, N buckets. ``n(i, j)`` is the bucket of
query i and key j, ``far(i, j)`` their distance. With q scaled, the logits and the output are::

    content[i, j] = sum_c channels[c, n] * q_ic * k_jc         (without such a term: q_i . k_j)
    logits[i, j]  = gain[n] * content[i, j]
                    + bias[n] + slope * far + q_i . query[:, n] + scale * k_j . key[:, n]
    out[i]        = sum_j P[i, j] * (v_j + value[n])
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .buckets import BucketIds

Kind = Literal["bias", "slope", "query", "key", "value", "gain", "channels"]


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One table and the buckets that index it.

    Args:
        kind: where the table acts, see the formula above. Terms of a kind add up; gains and
            channels multiply.
        table: ``[H | 1, N]`` for bias and gain, ``[H | 1, D, N]`` for query and key (the table
            that meets the query, or the key) and for channels, ``[H | 1, N, D]`` for value;
            ``[H | 1, 1]`` for slope, in any floating-point type: products with distances are made
            in float32 or better.
        buckets: n(i, j). A key term needs ``by_key`` buckets, a query and a value term the others;
            of a slope's only the distances count.
    """

    kind: Kind
    table: Tensor
    buckets: BucketIds
