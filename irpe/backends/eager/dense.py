"""Terms that are computed for each pair of a tile: bias, slope, gain and channels.

Their tables do not depend on queries and keys. Autograd computes the gradients of each tile, but
those of slopes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...buckets import BucketIds
from ...terms import Kind
from .gather import cut
from .tile import Tile

Dense = Sequence[tuple[Kind, BucketIds, Tensor]]


def pairs(terms: Dense, tile: Tile) -> tuple[Tensor | None, Tensor | None]:
    """Return the product of gains, and the sum of biases.

    Returns:
        Each ``[1 | images, heads | 1, rows, keys]``; None without such terms.
    """
    gain = added = None
    for kind, buckets, table in terms:
        if kind in ("bias", "gain"):
            # The gradient of table[:, ids] would be slow.
            ids, table = cut(buckets.dense(table.device), tile), _heads(table, tile)
            flat = ids.reshape(-1, 1, ids.shape[-2:].numel()).expand(-1, len(table), -1)
            one = table.expand(len(flat), -1, -1).gather(-1, flat).unflatten(-1, ids.shape[-2:])
        if kind == "gain":
            gain = one if gain is None else gain * one
        elif kind == "bias":
            added = one if added is None else added + one
    return gain, added


def add_slopes(terms: Dense, logits: Tensor, tile: Tile, add: bool) -> bool:
    """Write slopes times distances to ``[images, heads, rows, keys]``, or add them.

    Returns:
        Whether logits have been written to.
    """
    for kind, buckets, table in terms:
        if kind == "slope":
            slope, far = _heads(table.detach(), tile).unsqueeze(-1), _far(buckets, table, tile)
            if add:
                logits.addcmul_(slope, far)
            else:
                torch.mul(slope.expand(logits.shape), far, out=logits)
            add = True
    return add


def back_slopes(terms: Dense, grad_logits: Tensor, tile: Tile) -> None:
    """Accumulate the gradients of slopes."""
    for kind, buckets, table in terms:
        if kind == "slope" and table.requires_grad:
            table.grad = torch.zeros_like(table) if table.grad is None else table.grad
            each = (grad_logits * _far(buckets, table, tile)).sum((0, 2, 3)).unsqueeze(-1)
            own = _heads(table.grad, tile)
            own += each.sum_to_size(own.shape)


def by_channels(terms: Dense, q: Tensor, k: Tensor, tile: Tile) -> Tensor:
    """Return ``q k^T`` of q and k ``[n, rows | keys, D]``, with channels scaled by the terms."""
    q, k = (x.unflatten(0, tile.shape[:2]) for x in (q, k))
    weighed = k.unsqueeze(2)
    for kind, buckets, table in terms:
        if kind == "channels":
            ids = cut(buckets.dense(q.device), tile)
            # The gradient of index_select is one index_add.
            factor = _heads(table, tile).transpose(1, 2).index_select(1, ids.flatten())
            factor = factor.unflatten(1, ids.shape)  # [heads | 1, (images,) rows, keys, D]
            weighed = weighed * (factor.transpose(0, 1) if ids.dim() == 3 else factor)
    return (weighed @ q.unsqueeze(-1)).squeeze(-1).flatten(0, 1)


def _far(buckets: BucketIds, table: Tensor, tile: Tile) -> Tensor:
    """Return distances ``[(images, 1,) rows, keys]``."""
    far = cut(buckets.distances(table.device, table.dtype), tile)
    return far.unsqueeze(1) if far.dim() == 3 else far


def _heads(table: Tensor, tile: Tile) -> Tensor:
    return table[tile.heads] if len(table) > 1 else table
