"""Terms that are computed for each pair of a tile: bias, slope, gain and channels.

Their tables do not depend on queries and keys. Autograd computes the gradients of gains and
channels of each tile.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...buckets import BucketIds
from ...terms import Kind
from .gather import cut
from .tile import Tile

Dense = Sequence[tuple[Kind, BucketIds, Tensor]]


def gain_of(terms: Dense, tile: Tile) -> Tensor | None:
    """Return the product of gains ``[1 | images, heads | 1, rows, keys]``; None without gains."""
    gain = None
    for kind, buckets, table in terms:
        if kind == "gain":
            one = _gathered(buckets, table, tile)
            gain = one if gain is None else gain * one
    return gain


def add_biases(terms: Dense, logits: Tensor, tile: Tile) -> None:
    """Add biases, and slopes times distances, to ``[images, heads, rows, keys]``."""
    added = None
    for kind, buckets, table in terms:
        if kind == "slope":
            logits.addcmul_(_heads(table.detach(), tile).unsqueeze(-1), _far(buckets, table, tile))
        elif kind == "bias":
            one = _gathered(buckets, table.detach(), tile)
            added = one if added is None else added + one
    if added is not None:
        logits.add_(added)


def back_biases(terms: Dense, grad_logits: Tensor, tile: Tile) -> None:
    """Accumulate the gradients of biases and slopes."""
    for kind, buckets, table in terms:
        if kind not in ("slope", "bias") or not table.requires_grad:
            continue
        table.grad = torch.zeros_like(table) if table.grad is None else table.grad
        own = _heads(table.grad, tile)
        if kind == "slope":
            each = (grad_logits * _far(buckets, table, tile)).sum((0, 2, 3)).unsqueeze(-1)
        else:
            ids = _index(buckets, own, tile)
            one = grad_logits.sum_to_size(*ids.shape[:2], *grad_logits.shape[2:]).flatten(2)
            each = own.new_zeros(*ids.shape[:2], own.shape[-1]).scatter_add_(-1, ids, one).sum(0)
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


def _gathered(buckets: BucketIds, table: Tensor, tile: Tile) -> Tensor:
    """Return ``[1 | images, heads | 1, rows, keys]``."""
    # The gradient of table[:, ids] would be slow.
    table = _heads(table, tile)
    ids = _index(buckets, table, tile)
    return table.expand(len(ids), -1, -1).gather(-1, ids).unflatten(-1, tile.shape[2:])


def _index(buckets: BucketIds, table: Tensor, tile: Tile) -> Tensor:
    """Return ids ``[1 | images, heads | 1, rows * keys]``."""
    ids = cut(buckets.dense(table.device), tile)
    return ids.reshape(-1, 1, ids.shape[-2:].numel()).expand(-1, len(table), -1)


def _far(buckets: BucketIds, table: Tensor, tile: Tile) -> Tensor:
    """Return distances ``[(images, 1,) rows, keys]``."""
    far = cut(buckets.distances(table.device, table.dtype), tile)
    return far.unsqueeze(1) if far.dim() == 3 else far


def _heads(table: Tensor, tile: Tile) -> Tensor:
    return table[tile.heads] if len(table) > 1 else table
