"""The forward and the backward pass of attention with terms, tile by tile.

The logits and probabilities of a tile stay in the processor's cache. Small calls keep the
probabilities for the backward pass; for others the backward pass recomputes each tile, without
materialising ``[B, H, L, S]``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..call import project
from .part import Part
from .workspace import Workspace


def forward(work: Workspace, kept: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
    """Return the output ``[B, H, L, E]`` and the mass by bucket of each value term.

    Args:
        work: inputs and buffers.
        kept: list that the probabilities of each tile are appended to; None: not kept.
    """
    out = work.blank(work.q.new_empty(*work.shape[:3], work.v.shape[-1]))
    masses, numbers = _zeros(work, work.values), _numbers(work)
    for part in work.tiles.parts:
        Part(work, part, numbers).forward(out, masses, kept)
    for i, mass in zip(work.values, masses, strict=True):
        _add_project(out, mass, work.tables[i])
    return out.mul_(work.growth) if work.growth != 1.0 else out, masses


def backward(
    work: Workspace, grad: Tensor, masses: Sequence[Tensor], kept: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return the gradients of q, k, v and the tables.

    Args:
        work: inputs and buffers.
        grad: gradient of the output.
        masses: result of the forward pass.
        kept: probabilities of the forward pass; empty if tiles are recomputed.
    """
    scale = work.plan.call.scale
    upper = torch.mul(grad, work.growth, out=work.q.new_empty(grad.shape))
    own = grad_q, grad_k, _ = [work.blank(torch.empty_like(x)) for x in (work.q, work.k, work.v)]
    of_masses = [project(upper, work.tables[i].transpose(1, 2)) for i in work.values]
    sums, numbers, saved = _zeros(work, work.rows), [] if kept else _numbers(work), iter(kept)
    for part in work.tiles.parts:
        Part(work, part, numbers).backward(upper, of_masses, own, sums, saved)
    grads = {}
    for i, total in zip(work.rows, sums, strict=True):
        x, grad_x = (work.k, grad_k) if work.of_key(i) else (work.q, grad_q)
        if work.plan.terms[i][0] == "bias":
            grads[i] = total.sum((0, 2)).sum_to_size(work.tables[i].shape)
            continue
        total = total.mul_(scale) if work.of_key(i) else total
        _add_project(grad_x, total, work.tables[i].transpose(1, 2))
        grads[i] = _outer(x, total, work.tables[i])
    for i, mass in zip(work.values, masses, strict=True):
        grads[i] = _outer(mass, upper, work.tables[i])
    grad_q *= scale
    return [*own, *(grads.get(i, table.grad) for i, table in enumerate(work.tables))]


def _numbers(work: Workspace) -> list[Tensor]:
    """Return the rows ``[B, H, L | S, N]`` that the logits gather from."""
    numbers = []
    for i in work.rows:
        table = work.tables[i]
        if work.plan.terms[i][0] == "bias":
            numbers.append(table.unsqueeze(1).expand(*work.shape[:3], -1))
        elif work.of_key(i):
            numbers.append(project(work.k, table * work.plan.call.scale))
        else:
            numbers.append(project(work.q, table))
    return numbers


def _zeros(work: Workspace, terms: Sequence[int]) -> list[Tensor]:
    """Return zero buffers ``[B, H, L | S, N]`` for each term."""
    B, H, L, S = work.shape
    sizes = ((S if work.of_key(i) else L, work.plan.terms[i][1].size) for i in terms)
    return [work.q.new_zeros(B, H, *size) for size in sizes]


def _add_project(out: Tensor, x: Tensor, table: Tensor) -> None:
    """Add ``[B, H, R, D] @ [H | 1, D, N]``."""
    if table.shape[0] == 1:
        out.flatten(0, 2).addmm_(x.flatten(0, 2), table[0])
    else:
        out += x @ table


def _outer(x: Tensor, y: Tensor, table: Tensor) -> Tensor:
    """Return a table's gradient ``[H | 1, D, N]``, of x ``[B, H, R, D]`` and y ``[B, H, R, N]``."""
    if table.shape[0] == 1:
        return (x.flatten(0, 2).t() @ y.flatten(0, 2)).unsqueeze(0)
    return (x.transpose(-2, -1) @ y).sum(0)
