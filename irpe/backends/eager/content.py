"""The content logits q k^T, and what multiplies them: gains, and factors for each channel.

Factors of channels want ``[L, S, D]`` numbers, which are laid out for a few queries at a time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...buckets import BucketIds
from ..call import expanded
from .rows import bias_grad

CHUNK = 2**20  # numbers [B, H, rows, S, D] at a time
Multipliers = Sequence[tuple[BucketIds, Tensor]]


def content_logits(q: Tensor, k: Tensor, channels: Multipliers) -> Tensor:
    """Logits ``[B, H, L, S]`` of contiguous q and k."""
    (B, H, L, D), S = q.shape, k.shape[-2]
    if not channels:
        return (q.view(B * H, L, D) @ k.view(B * H, S, D).transpose(1, 2)).view(B, H, L, S)
    logits = q.new_empty(B, H, L, S)
    for rows in _chunks(q, S):
        _, joint = _factors(channels, rows, q.device)
        weighed = k.unsqueeze(2) * joint  # [B, H, rows, S, D]
        logits[:, :, rows] = (weighed @ q[:, :, rows].unsqueeze(-1)).squeeze(-1)
    return logits


def content_grads(
    flow: Tensor, q: Tensor, k: Tensor, channels: Multipliers
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of q, k and the channels' tables for one ``[B, H, L, S]`` of the logits."""
    (B, H, L, D), S = q.shape, k.shape[-2]
    if not channels:
        flow3 = flow.view(B * H, L, S)
        grad_q = (flow3 @ k.view(B * H, S, D)).view(q.shape)
        return grad_q, (flow3.transpose(1, 2) @ q.view(B * H, L, D)).view(k.shape), []
    wide = torch.promote_types(q.dtype, torch.float32)
    grad_q, grad_k = torch.empty_like(q), torch.zeros_like(k, dtype=wide)
    sums = [torch.zeros_like(table.transpose(1, 2), dtype=wide) for _, table in channels]
    for rows in _chunks(q, S):
        factors, joint = _factors(channels, rows, q.device)
        own = flow[:, :, rows].unsqueeze(-1)  # [B, H, rows, S, 1]
        grad_q[:, :, rows] = ((k.unsqueeze(2) * joint).transpose(-2, -1) @ own).squeeze(-1)
        product = own * q[:, :, rows].unsqueeze(-2)  # [B, H, rows, S, D]
        grad_k += (product * joint).sum(2, dtype=wide)
        product = product * k.unsqueeze(2)
        for n, ((buckets, _), total) in enumerate(zip(channels, sums, strict=True)):
            others = [f for m, f in enumerate(factors) if m != n]
            part = product * _product(others) if others else product
            _add_by_bucket(total, part, buckets.dense(q.device)[..., rows, :])
    tables = [
        s.transpose(1, 2).to(table.dtype) for s, (_, table) in zip(sums, channels, strict=True)
    ]
    return grad_q, grad_k.to(k.dtype), tables


def gain_grads(
    flow: Tensor, q: Tensor, k: Tensor, channels: Multipliers, gains: Multipliers
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the content logits ``[B, H, L, S]`` and of the gains' tables.

    q is scaled, as in the forward pass: the content is computed again, and not kept.
    """
    inner = content_logits(q, k, channels)
    factors = [expanded(table, buckets.dense(q.device)) for buckets, table in gains]
    tables = []
    for n, (buckets, table) in enumerate(gains):
        others = [f for m, f in enumerate(factors) if m != n]
        part = flow * inner
        part = part * _product(others) if others else part
        tables.append(bias_grad(part, buckets.dense(q.device), table))
    return flow * _product(factors), tables


def _chunks(q: Tensor, keys: int) -> list[slice]:
    B, H, L, D = q.shape
    rows = max(1, CHUNK // max(1, B * H * keys * D))
    return [slice(start, min(start + rows, L)) for start in range(0, L, rows)]


def _factors(
    channels: Multipliers, rows: slice, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """Factors ``[1 | B, H | 1, rows, S, D]`` of each term, and their product."""
    factors = []
    for buckets, table in channels:
        ids = buckets.dense(device)[..., rows, :]
        factor = table.transpose(1, 2)[:, ids]  # [H | 1, (B,) rows, S, D]
        factors.append(factor.transpose(0, 1) if ids.dim() == 3 else factor.unsqueeze(0))
    return factors, _product(factors)


def _product(factors: Sequence[Tensor]) -> Tensor:
    product = factors[0]
    for factor in factors[1:]:
        product = product * factor
    return product


def _add_by_bucket(total: Tensor, x: Tensor, ids: Tensor) -> None:
    """``total[h, n] += `` the sum of x ``[B, H, rows, S, D]`` where ids are n."""
    if total.shape[0] == 1:
        x = x.sum(1, keepdim=True, dtype=total.dtype)
    if ids.dim() == 2:
        x, ids = x.sum(0, keepdim=True, dtype=total.dtype), ids.unsqueeze(0)
    for own, sample in zip(ids, x, strict=True):
        total.index_add_(1, own.flatten(), sample.flatten(1, 2).to(total.dtype))
