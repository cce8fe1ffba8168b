"""Attention with terms, tile after tile: for logits that are larger than a processor's cache.

A tile of logits is made, turned into probabilities and used up while it is in the cache, and the
backward pass makes it again: nothing of size ``[B, H, L, S]`` is in memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..call import Call
from .band import Line
from .groups import Grads, Plan
from .patterns import grouped, pattern_of
from .rows import add_times, outer
from .tiles import Part, Tile, Tiles

SIZE = 2**19  # numbers of a tile for each thread
Writes = list[tuple[Callable[..., None], Any]]
KINDS = frozenset({"bias", "query", "key", "value"})


def serves(call: Call) -> bool:
    """Whether tiles can do all terms of a call, and are the faster way."""
    plain = type(call.q) in (Tensor, nn.Parameter) and call.q.device.type == "cpu"
    if not plain or any(term.kind not in KINDS for term in call.terms):
        return False
    return call.q.shape[-2] * call.k.shape[-2] >= least(call)


def least(call: Call) -> int:
    """L * S from which tiles are faster, as measured with head dims 32 and 64."""
    if call.q.dtype == torch.bfloat16:
        return 2**20  # the other way multiplies in bfloat16
    geometries = [term.buckets.geometry for term in call.terms]
    return 2**16 if isinstance(pattern_of(geometries, call.is_causal), Line) else 2**18


class Pass:
    """A forward or a backward pass, in float32 or better.

    Args:
        qkv: of as many heads. size: numbers of a tile. seed: of the dropout; None without.
    """

    def __init__(
        self,
        call: Call,
        plan: Plan,
        qkv: Sequence[Tensor],
        tables: Sequence[Tensor],
        size: int,
        seed: int | None,
    ) -> None:
        q, k, v = qkv
        call = replace(call, q=q, k=k)
        self.shape, self.scale = q.shape[:3], call.scale
        wide = torch.promote_types(q.dtype, torch.float32)
        # Scaled and laid out in one pass.
        self.q = torch.mul(q, call.scale, out=q.new_empty(q.shape, dtype=wide))
        self.k, self.v = (x.to(wide).contiguous() for x in (k, v))
        self.tables = [table.to(wide) for table in tables]
        pattern, groups = grouped(plan, self.tables, q.device, call.is_causal)
        self.tiles = Tiles(call, pattern, size)
        self.of_queries = [(g, g.numbers(self.q)) for g in groups if g.owner == "query"]
        self.of_keys = [(g, g.numbers(self.k * self.scale)) for g in groups if g.owner == "key"]
        self.of_values = [g for g in groups if g.owner == "value"]
        self.kept = 1.0 - call.dropout_p
        # What dropout keeps makes up for the rest, unless it keeps nothing.
        self.growth = 1.0 / self.kept if self.kept else 1.0
        self.draws = None if seed is None else torch.Generator(q.device).manual_seed(seed)
        self._memory: dict[str, Tensor] = {}

    def forward(self) -> tuple[Tensor, list[Tensor]]:
        """The output ``[B, H, L, D]`` and, for each group of value terms, the mass by bucket."""
        q, k, v = (x.flatten(0, 1) for x in (self.q, self.k, self.v))
        out = q.new_zeros(*q.shape[:2], v.shape[-1])
        masses = [q.new_zeros(*q.shape[:2], group.spread.size) for group in self.of_values]
        for part in self.tiles:
            keys, values = (part.keys.take(x[part.lead]) for x in (k, v))
            laid = self._laid(part)
            for tile in part.tiles:
                own = (tile.lead, tile.rows)
                kept = self._probabilities(tile, q[own], keys, laid)
                if self.draws is not None:
                    kept.mul_(self.keep(tile))
                out[own] = torch.bmm(kept, values[:, : tile.count])
                for group, mass in zip(self.of_values, masses, strict=True):
                    mass[own] = group.spread.sum(kept, tile)
        out = out.unflatten(0, self.shape[:2])
        for group, mass in zip(self.of_values, masses, strict=True):
            table = group.table("value")
            assert table is not None
            add_times(out, mass.unflatten(0, self.shape[:2]), table)
        return out.mul_(self.growth), masses

    def backward(self, grad: Tensor, masses: Sequence[Tensor]) -> Grads:
        """Gradients of q, k, v and the tables."""
        upper = torch.mul(grad, self.growth, out=self.q.new_empty(grad.shape))
        q, k, v, g = (x.flatten(0, 1) for x in (self.q, self.k, self.v, upper))
        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
        sums_q = [torch.zeros_like(numbers) for _, numbers in self.of_queries]
        sums_k = [torch.zeros_like(numbers) for _, numbers in self.of_keys]
        flows: Writes = [(group.spread.write, group.numbers(upper)) for group in self.of_values]
        for part in self.tiles:
            keys, values = (part.keys.take(x[part.lead]) for x in (k, v))
            laid = self._laid(part)
            own_k, own_v = (part.keys.take(x[part.lead]) for x in (grad_k, grad_v))  # zeros
            laid_sums = [tuple(map(torch.zeros_like, some)) for some in laid]
            for tile in part.tiles:
                own, count = (tile.lead, tile.rows), tile.count
                kept = self._probabilities(tile, q[own], keys, laid)
                flow, dropped = self._space("flow", tile), kept
                if self.draws is not None:
                    dropped = torch.mul(kept, self.keep(tile), out=flow)
                _add_product(own_v[:, :count], dropped.transpose(1, 2), g[own])
                self._product(flow, flows, tile, g[own], values)
                if self.draws is not None:
                    flow.mul_(self._space("keep", tile))
                torch.ops.aten._softmax_backward_data.out(
                    flow, kept, -1, kept.dtype, grad_input=flow
                )  # gradient of the logits from here on
                grad_q[own] = torch.bmm(flow, keys[:, :count])
                _add_product(own_k[:, :count], flow.transpose(1, 2), q[own])
                for (group, _), sums in zip(self.of_queries, sums_q, strict=True):
                    sums[own] = group.spread.sum(flow, tile)
                for (group, _), some in zip(self.of_keys, laid_sums, strict=True):
                    group.spread.add_laid(some, flow, tile)
            if part.keys.index is not None:  # else they are views
                part.keys.put(grad_k[part.lead], own_k)
                part.keys.put(grad_v[part.lead], own_v)
            for (group, _), some, sums in zip(self.of_keys, laid_sums, sums_k, strict=True):
                part.keys.put(sums[part.lead], group.spread.lift(some, part.keys))
        grads: Grads = [None] * len(self.tables)
        grad_q, grad_k, grad_v = (x.unflatten(0, self.shape[:2]) for x in (grad_q, grad_k, grad_v))
        for (group, _), sums in zip(self.of_queries, sums_q, strict=True):
            group.back(grads, self.q, grad_q, sums)
        for (group, _), sums in zip(self.of_keys, sums_k, strict=True):
            group.back(grads, self.k, grad_k, sums.mul_(self.scale))
        for group, mass in zip(self.of_values, masses, strict=True):
            mass, table = mass.unflatten(0, self.shape[:2]), group.table("value")
            assert table is not None
            group.give(grads, "value", outer(mass, upper, table))
        return [grad_q.mul_(self.scale), grad_k, grad_v, *grads]

    def keep(self, tile: Tile) -> Tensor:
        """1 for what dropout keeps of a tile, else 0; asked for once a tile, in their order."""
        return self._space("keep", tile).bernoulli_(self.kept, generator=self.draws)

    def keep_all(self) -> Tensor:
        """The bool ``[B, H, L, S]`` of all tiles; True where there is none."""
        every = torch.ones(*self.shape, self.k.shape[2], dtype=torch.bool, device=self.k.device)
        for part in self.tiles:
            for tile in part.tiles:
                own, kept = every[tile.images, tile.heads, tile.rows], self.keep(tile) != 0
                index = tile.keys.index
                if index is None:
                    own[..., : tile.count] = kept.view(tile.shape)
                else:
                    own.index_copy_(-1, index, kept.view(tile.shape))
        return every

    def _laid(self, part: Part) -> list[tuple[Tensor, ...]]:
        return [
            group.spread.lay(part.keys.take(numbers[part.lead]), part.keys)
            for group, numbers in self.of_keys
        ]

    def _probabilities(
        self, tile: Tile, q: Tensor, keys: Tensor, laid: list[tuple[Tensor, ...]]
    ) -> Tensor:
        """``[n, rows, keys]`` in memory that the next tile overwrites."""
        logits = self._space("logits", tile)
        writes: Writes = [(group.spread.write, numbers) for group, numbers in self.of_queries]
        writes += [
            (group.spread.write_laid, some)
            for (group, _), some in zip(self.of_keys, laid, strict=True)
        ]
        self._product(logits, writes, tile, q, keys)
        dead = self.tiles.hide(logits, tile)
        torch.softmax(logits, -1, out=logits)
        if dead is not None:
            logits.view(tile.shape).masked_fill_(dead, 0.0)
        return logits

    def _product(
        self,
        out: Tensor,
        writes: Writes,
        tile: Tile,
        x: Tensor,
        y: Tensor,
    ) -> None:
        """``out = x @ y^T`` and what is written for the terms."""
        for number, (write, numbers) in enumerate(writes):
            if number == 0:
                write(out, numbers, tile)
            else:
                more = self._space("more", tile)
                write(more, numbers, tile)
                out += more
        y = y[:, : tile.count].transpose(1, 2)
        if writes:
            out.baddbmm_(x, y)
        else:
            torch.bmm(x, y, out=out)

    def _space(self, name: str, tile: Tile) -> Tensor:
        """Memory ``[n, rows, keys]`` for a tile, the same for all tiles."""
        nb, nh, rows, count = tile.shape
        size = nb * nh * rows * count
        if name not in self._memory or self._memory[name].numel() < size:
            self._memory[name] = self.q.new_empty(size)
        return self._memory[name][:size].view(nb * nh, rows, count)


def _add_product(out: Tensor, x: Tensor, y: Tensor) -> None:
    """``out += x @ y``; products into memory with gaps do not use all threads."""
    if out.is_contiguous():
        out.baddbmm_(x, y)
    else:
        out += torch.bmm(x, y)
