"""Gathers and sums over buckets, on rows laid end to end; tables shared by all heads or not."""

import torch
from torch import Tensor

from ...buckets import BucketIds


def times(x: Tensor, table: Tensor) -> Tensor:
    """``[B, H, R, D] @ [H | 1, D, N]`` of contiguous x, one product for a shared table."""
    if table.shape[0] == 1:
        return (x.flatten(0, -2) @ table[0]).view(*x.shape[:-1], table.shape[-1])
    return x @ table


def add_times(out: Tensor, x: Tensor, table: Tensor) -> None:
    """``out += x @ table``."""
    if table.shape[0] == 1:
        out.flatten(0, -2).addmm_(x.flatten(0, -2), table[0])
    else:
        out += x @ table


def outer(x: Tensor, y: Tensor, table: Tensor) -> Tensor:
    """Gradient of a table that took x ``[B, H, R, D]`` to y ``[B, H, R, N]``: its shape."""
    if table.shape[0] == 1:
        return (x.flatten(0, -2).t() @ y.flatten(0, -2)).unsqueeze(0)
    return (x.transpose(-2, -1) @ y).sum(0)


def add_rows(out: Tensor, rows: Tensor, buckets: BucketIds) -> None:
    """``out[b, h, i, j] += rows[b, h, owner, n(i, j)]``, rows ``[B, H, R, N]``."""
    B, H = out.shape[:2]
    index = buckets.flat(out.device).expand(B, H, -1)
    out.flatten(2).add_(rows.flatten(2).gather(-1, index))


def sum_rows(x: Tensor, buckets: BucketIds, length: int) -> Tensor:
    """``[B, H, length * N]``: x ``[B, H, L, S]`` summed over the pairs of each owner and bucket."""
    B, H = x.shape[:2]
    index = buckets.flat(x.device).expand(B, H, -1)
    # Sums of hundreds of numbers are kept in float32, whatever x is.
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = torch.zeros(B, H, length * buckets.size, dtype=wide, device=x.device)
    return sums.scatter_add_(-1, index, x.flatten(2).to(wide)).to(x.dtype)


def bias_grad(flow: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    """Gradient of a bias table for one ``[B, H, L, S]`` of the logits."""
    if table.shape[0] == 1:
        flow = flow.sum(1, keepdim=True)
    if ids.dim() == 2:
        flow, ids = flow.sum(0, keepdim=True), ids.unsqueeze(0)
    flow = flow.flatten(2)
    wide = torch.promote_types(flow.dtype, torch.float32)
    sums = torch.zeros(*flow.shape[:2], table.shape[-1], dtype=wide, device=flow.device)
    index = ids.flatten(1).unsqueeze(1).expand_as(flow)
    return sums.scatter_add_(-1, index, flow.to(wide)).sum(0).to(table.dtype)


def slope_grad(flow: Tensor, buckets: BucketIds, table: Tensor) -> Tensor:
    """Gradient of a slope for one of the logits."""
    wide = torch.promote_types(flow.dtype, torch.float32)
    far = buckets.distances(flow.device, wide)
    far = far.unsqueeze(1) if far.dim() == 3 else far
    sums = (flow.to(wide) * far).sum((0, 2, 3)).unsqueeze(-1)
    return (sums.sum(0, keepdim=True) if table.shape[0] == 1 else sums).to(table.dtype)
