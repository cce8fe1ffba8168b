"""Attention with terms, tile after tile: for logits that are larger than a processor's cache.

A tile of logits is made, turned into probabilities and used up while it is in the cache, and the
backward pass makes it again: nothing of size ``[B, H, L, S]`` is in memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..call import Call
from .band import Line
from .groups import Grads, Group, Plan
from .part import Shared, Work
from .patterns import grouped, pattern_of
from .rows import add_times, outer
from .runs import WholeGrid
from .tiles import Tiles

SIZE = 2**19  # numbers of a tile for each thread: 2 MiB
KEPT = 2**25  # bytes: larger memory goes back to the system (malloc), to be cleared when asked for
KINDS = frozenset({"bias", "query", "key", "value"})


def serves(call: Call) -> bool:
    """Whether tiles can do all terms of a call, and are the faster way."""
    plain = type(call.q) in (Tensor, nn.Parameter) and call.q.device.type == "cpu"
    if not plain or any(term.kind not in KINDS for term in call.terms):
        return False
    return call.q.shape[-2] * call.k.shape[-2] >= least(call)


def least(call: Call) -> int:
    """L * S from which tiles are faster or, at the same speed, take less memory, as measured."""
    if call.q.dtype == torch.bfloat16:
        return 2**20  # the other way multiplies in bfloat16
    pattern = pattern_of([term.buckets.geometry for term in call.terms], call.is_causal)
    if isinstance(pattern, Line):
        return 2**16
    if isinstance(pattern, WholeGrid):
        # Prefix tokens slow tiles down. Logits that the C library keeps cost the other way less.
        B, H, L, _ = call.q.shape
        if pattern.prefix or 4 * B * H * L * call.k.shape[-2] <= KEPT:
            return 2**20
    return 2**18


class Pass(Shared):
    """A forward or a backward pass, in float32 or better.

    Args:
        qkv: of as many heads. threads: that share a tile, as many in both passes. seed: of the
            dropout; None without.
    """

    def __init__(
        self,
        call: Call,
        plan: Plan,
        qkv: Sequence[Tensor],
        tables: Sequence[Tensor],
        threads: int,
        seed: int | None,
    ) -> None:
        super().__init__()
        q, k, v = qkv
        call = replace(call, q=q, k=k)
        self.shape, self.scale = q.shape[:3], call.scale
        wide = torch.promote_types(q.dtype, torch.float32)
        # Scaled and laid out in one pass.
        self.q = torch.mul(q, call.scale, out=q.new_empty(q.shape, dtype=wide))
        self.k, self.v = (x.to(wide).contiguous() for x in (k, v))
        self.tables = [table.to(wide) for table in tables]
        pattern, groups = grouped(plan, self.tables, q.device, call.is_causal)
        self.tiles = Tiles(call, pattern, SIZE * threads, threads)
        self.logits = [(g, g.numbers(self._owner(g))) for g in groups if g.owner != "value"]
        self.values = [g for g in groups if g.owner == "value"]
        self.kept = 1.0 - call.dropout_p
        # What dropout keeps makes up for the rest, unless it keeps nothing.
        self.growth = 1.0 / self.kept if self.kept else 1.0
        self.seed = seed

    def forward(self) -> tuple[Tensor, list[Tensor]]:
        """The output ``[B, H, L, D]`` and, for each group of value terms, the mass by bucket."""
        B, H, L = self.shape
        out = self.q.new_zeros(B * H, L, self.v.shape[-1])
        masses = [self.q.new_zeros(B * H, L, group.spread.size) for group in self.values]
        for work in self._works():
            work.forward(out, masses)
        out = out.unflatten(0, (B, H))
        for group, mass in zip(self.values, masses, strict=True):
            table = group.table("value")
            assert table is not None
            add_times(out, mass.unflatten(0, (B, H)), table)
        return out.mul_(self.growth), masses

    def backward(self, grad: Tensor, masses: Sequence[Tensor]) -> Grads:
        """Gradients of q, k, v and the tables."""
        upper = torch.mul(grad, self.growth, out=self.q.new_empty(grad.shape))
        flows = [(group, group.numbers(upper)) for group in self.values]
        grad_q, grad_k, grad_v = inner = [torch.zeros_like(x) for x in (self.q, self.k, self.v)]
        into = [x.flatten(0, 1) for x in inner]
        sums = [torch.zeros_like(numbers) for _, numbers in self.logits]
        flat = upper.flatten(0, 1)
        for work in self._works():
            work.backward(flat, flows, into, sums)
        grads: Grads = [None] * len(self.tables)
        for (group, _), total in zip(self.logits, sums, strict=True):
            if group.owner == "query":
                group.back(grads, self.q, grad_q, total)
            else:
                group.back(grads, self.k, grad_k, total.mul_(self.scale))
        for group, mass in zip(self.values, masses, strict=True):
            mass, table = mass.unflatten(0, self.shape[:2]), group.table("value")
            assert table is not None
            group.give(grads, "value", outer(mass, upper, table))
        return [grad_q.mul_(self.scale), grad_k, grad_v, *grads]

    def _owner(self, group: Group) -> Tensor:
        return self.q if group.owner == "query" else self.k * self.scale

    def keep(self) -> Tensor:
        """What dropout keeps, bool ``[B, H, L, S]``; True where there is no tile."""
        every = torch.ones(*self.shape, self.k.shape[2], dtype=torch.bool, device=self.k.device)

        for work in self._works():
            for tile in work.part.tiles:
                own = every[tile.images, tile.heads, tile.rows]
                kept = (work.keep(tile) != 0).view(tile.shape)
                if tile.keys.index is None:
                    own[..., : tile.count] = kept
                else:
                    own.index_copy_(-1, tile.keys.index, kept)
        return every

    def _works(self) -> Iterator[Work]:
        """Every part, one after another."""
        for number, part in enumerate(self.tiles):
            yield Work(self, part, None if self.seed is None else self.seed + number)
