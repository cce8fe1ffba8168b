"""The tiles of one part of a call: what is computed while it is in the cache."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .tiles import Part, Tile

if TYPE_CHECKING:
    from .tiled import Pass

_memory = threading.local()  # fresh memory costs about as much as what is computed in it
Writes = list[tuple[Callable[..., None], Any]]


class Work:
    """One part; several may be at work at the same time, each on images and heads of its own.

    Args:
        seed: of the dropout; None without.
    """

    def __init__(self, given: Pass, part: Part, seed: int | None) -> None:
        self.given, self.part = given, part
        self.q = given.q.flatten(0, 1)
        self.k, self.v = self.keys(given.k), self.keys(given.v)
        self.draws = None if seed is None else torch.Generator(self.q.device).manual_seed(seed)
        self.laid = [
            group.spread.lay(part.keys.take(numbers[part.lead]), part.keys)
            for group, numbers in given.of_keys
        ]

    def keys(self, x: Tensor) -> Tensor:
        """What a tensor ``[B, H, S, D]`` has for the keys of this part: ``[n, keys, D]``."""
        return self.part.keys.take(x.flatten(0, 1)[self.part.lead])

    def forward(self, out: Tensor, masses: Sequence[Tensor]) -> None:
        """Writes output ``[B * H, L, D]`` and mass by bucket ``[B * H, L, N]``."""
        for tile in self.part.tiles:
            own = (tile.lead, tile.rows)
            kept = self._probabilities(tile)
            if self.draws is not None:
                kept.mul_(self.keep(tile))
            out[own] = torch.bmm(kept, self.v[:, : tile.count])
            for group, mass in zip(self.given.of_values, masses, strict=True):
                mass[own] = group.spread.sum(kept, tile)

    def backward(
        self,
        grad: Tensor,
        flows: Writes,
        grads: Sequence[Tensor],
        query_sums: Sequence[Tensor],
        key_sums: Sequence[Tensor],
    ) -> None:
        """Writes gradients of q, k and v, and of the rows of numbers, ``[B * H, L | S, ...]``."""
        grad_q, grad_k, grad_v = grads
        keys, lead = self.part.keys, self.part.lead
        own_k, own_v = torch.zeros_like(self.k), torch.zeros_like(self.v)
        laid_sums = [tuple(map(torch.zeros_like, some)) for some in self.laid]
        for tile in self.part.tiles:
            own, count = (tile.lead, tile.rows), tile.count
            kept = self._probabilities(tile)
            flow, dropped = self._space("flow", tile), kept
            if self.draws is not None:
                dropped = torch.mul(kept, self.keep(tile), out=flow)
            _add_product(own_v[:, :count], dropped.transpose(1, 2), grad[own])
            self._product(flow, flows, tile, grad[own], self.v)
            if self.draws is not None:
                flow.mul_(self._space("keep", tile))
            torch.ops.aten._softmax_backward_data.out(
                flow, kept, -1, kept.dtype, grad_input=flow
            )  # gradient of the logits from here on
            grad_q[own] = torch.bmm(flow, self.k[:, :count])
            _add_product(own_k[:, :count], flow.transpose(1, 2), self.q[own])
            for (group, _), sums in zip(self.given.of_queries, query_sums, strict=True):
                sums[own] = group.spread.sum(flow, tile)
            for (group, _), some in zip(self.given.of_keys, laid_sums, strict=True):
                group.spread.add_laid(some, flow, tile)
        keys.put(grad_k[lead], own_k)
        keys.put(grad_v[lead], own_v)
        for (group, _), some, sums in zip(self.given.of_keys, laid_sums, key_sums, strict=True):
            keys.put(sums[lead], group.spread.lift(some, keys))

    def keep(self, tile: Tile) -> Tensor:
        """1 for what dropout keeps of a tile, else 0; asked for once a tile, in their order."""
        return self._space("keep", tile).bernoulli_(self.given.kept, generator=self.draws)

    def _probabilities(self, tile: Tile) -> Tensor:
        """``[n, rows, keys]`` in memory that the next tile overwrites."""
        logits, given = self._space("logits", tile), self.given
        writes: Writes = [(group.spread.write, numbers) for group, numbers in given.of_queries]
        for (group, _), laid in zip(given.of_keys, self.laid, strict=True):
            writes.append((group.spread.write_laid, laid))
        self._product(logits, writes, tile, self.q[tile.lead, tile.rows], self.k)
        dead = given.tiles.hide(logits, tile)
        torch.softmax(logits, -1, out=logits)
        if dead is not None:
            logits.view(tile.shape).masked_fill_(dead, 0.0)
        return logits

    def _product(self, out: Tensor, writes: Writes, tile: Tile, x: Tensor, y: Tensor) -> None:
        """``out = x @ y^T`` and what is written for the terms."""
        for number, (write, numbers) in enumerate(writes):
            space = out if number == 0 else self._space("more", tile)
            write(space, numbers, tile)
            if number > 0:
                out += space
        y = y[:, : tile.count].transpose(1, 2)
        if writes:
            out.baddbmm_(x, y)
        else:
            torch.bmm(x, y, out=out)

    def _space(self, name: str, tile: Tile) -> Tensor:
        """Memory ``[n, rows, keys]`` for a tile, the same for all tiles of a thread."""
        nb, nh, rows, count = tile.shape
        size, key = nb * nh * rows * count, (name, self.q.dtype, self.q.is_inference())
        if key not in _memory.__dict__ or _memory.__dict__[key].numel() < size:
            _memory.__dict__[key] = self.q.new_empty(size)
        return _memory.__dict__[key][:size].view(nb * nh, rows, count)


def _add_product(out: Tensor, x: Tensor, y: Tensor) -> None:
    """``out += x @ y``; products into memory with gaps do not use all threads."""
    if out.is_contiguous():
        out.baddbmm_(x, y)
    else:
        out += torch.bmm(x, y)
