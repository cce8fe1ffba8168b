"""Empty outputs of the operators; their shapes, dtypes and strides."""

from collections.abc import Sequence

import torch
from torch import Tensor


def empty_outputs(
    q: Tensor, k: Tensor, v: Tensor, kinds: Sequence[str], wide: int, on_grid: bool
) -> list[Tensor]:
    """Return the outputs for W numbers in a row."""
    (B, H, L, D), (S, E) = q.shape, v.shape[2:]
    made = [empty_like((B, H, L, E), q), q.new_empty((2, H, B, L), dtype=torch.float32)]
    # On strips they enter a product, whose other side has this dtype.
    kind = torch.float32 if "bias" in kinds and not on_grid else q.dtype
    vectors = {*kinds} - {"bias"}
    if vectors:
        made.append(q.new_empty((len(vectors), H, wide, max(padded(D), padded(E)))))
    if "bias" in kinds:
        made.append(q.new_empty((H, wide), dtype=kind))
    if "query" in kinds:
        made.append(q.new_empty((H, B, L, wide), dtype=kind))
    if "key" in kinds:
        made.append(q.new_empty((H, B, S, wide)))
    return made


def padded(width: int) -> int:
    """Return the channels of a head in a tile."""
    return max(16, 1 << (width - 1).bit_length())


def empty_flat(tables: Sequence[Tensor], wanted: Sequence[bool], q: Tensor) -> Tensor:
    """Return an empty tensor for the gradients of all tables, one after another."""
    dtypes = {t.dtype for t in tables}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return q.new_empty(sum(t.numel() for t in tables) if any(wanted) else 0, dtype=dtype)


def empty_like(shape: Sequence[int], x: Tensor) -> Tensor:
    """Return an empty ``[B, H, R, D]``, a view of ``[B, R, H, D]`` as projections have it."""
    B, H, R, D = shape
    return x.new_empty((B, R, H, D)).transpose(1, 2)
