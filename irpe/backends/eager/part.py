"""The tiles of one part of a call: what is computed while it is in the cache."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .groups import Group
from .spread import Laid, Spread
from .tile import Part, Tile
from .tiles import Tiles


class Shared:
    """What the parts of a pass have in common.

    Attributes:
        q, k, v: ``[B, H, L | S, D]``, q times the scale. tiles: of the call.
        logits: groups of terms on the logits, with their rows of numbers. values: of value terms.
        kept: share that dropout keeps.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    tiles: Tiles
    logits: list[tuple[Group, Tensor]]
    values: list[Group]
    kept: float

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def space(self, name: str, tile: Tile) -> Tensor:
        """Memory ``[n, rows, keys]`` for a tile, the same for all tiles."""
        nb, nh, rows, count = tile.shape
        size = nb * nh * rows * count
        if name not in self._memory or self._memory[name].numel() < size:
            self._memory[name] = self.q.new_empty(size)
        return self._memory[name][:size].view(nb * nh, rows, count)


class Work:
    """One part.

    Args:
        seed: of the dropout; None without.
    """

    def __init__(self, given: Shared, part: Part, seed: int | None) -> None:
        self.given, self.part, self.keys = given, part, part.keys
        self.q = self._lead(given.q)
        self.k, self.v = (self.keys.take(self._lead(x)) for x in (given.k, given.v))
        self.draws = None if seed is None else torch.Generator(self.q.device).manual_seed(seed)
        self.terms = [self._laid(group, numbers) for group, numbers in given.logits]

    def forward(self, out: Tensor, masses: Sequence[Tensor]) -> None:
        """Writes output ``[B * H, L, D]`` and mass by bucket ``[B * H, L, N]``."""
        out, sums = out[self.part.lead], [self._blank(group) for group in self.given.values]
        for tile in self.part.tiles:
            kept = self._probabilities(tile)
            if self.draws is not None:
                kept.mul_(self.keep(tile))
            _into(out[:, tile.rows], kept, _first(self.v, tile))
            for spread, some in sums:
                spread.add(some, kept, tile)
        for (spread, some), mass in zip(sums, masses, strict=True):
            spread.lift(some, self.keys, mass[self.part.lead])

    def backward(
        self,
        grad: Tensor,
        flows: Sequence[tuple[Group, Tensor]],
        grads: Sequence[Tensor],
        totals: Sequence[Tensor],
    ) -> None:
        """Writes gradients of q, k and v, and of the rows of numbers, ``[B * H, L | S, ...]``."""
        lead, keys = self.part.lead, self.keys
        grad, own_q = grad[lead], grads[0][lead]
        own_k, own_v = torch.zeros_like(self.k), torch.zeros_like(self.v)
        values = [self._laid(group, numbers) for group, numbers in flows]
        sums = [self._blank(group) for group, _ in self.given.logits]
        for tile in self.part.tiles:
            kept, upper = self._probabilities(tile), grad[:, tile.rows]
            flow, dropped = self.given.space("flow", tile), kept
            if self.draws is not None:
                dropped = torch.mul(kept, self.keep(tile), out=flow)
            _add(_first(own_v, tile), dropped.transpose(1, 2), upper)
            self._product(flow, values, tile, upper, self.v)
            if self.draws is not None:
                flow.mul_(self.given.space("keep", tile))
            torch.ops.aten._softmax_backward_data.out(
                flow, kept, -1, kept.dtype, grad_input=flow
            )  # gradient of the logits from here on
            _into(own_q[:, tile.rows], flow, _first(self.k, tile))
            _add(_first(own_k, tile), flow.transpose(1, 2), self.q[:, tile.rows])
            for spread, some in sums:
                spread.add(some, flow, tile)
        keys.put(grads[1][lead], own_k)
        keys.put(grads[2][lead], own_v)
        for (group, _), (spread, some), total in zip(self.given.logits, sums, totals, strict=True):
            if group.owner == "query":
                spread.lift(some, keys, total[lead])
            else:
                rows = total.new_zeros(len(own_k), keys.count, spread.size)
                spread.lift(some, keys, rows)
                keys.put(total[lead], rows)

    def keep(self, tile: Tile) -> Tensor:
        """1 for what dropout keeps of a tile, else 0; asked for once a tile, in their order."""
        return self.given.space("keep", tile).bernoulli_(self.given.kept, generator=self.draws)

    def _lead(self, x: Tensor) -> Tensor:
        """This part of ``[B, H, ...]``: ``[n, ...]``."""
        return x.flatten(0, 1)[self.part.lead]

    def _laid(self, group: Group, numbers: Tensor) -> tuple[Spread, Laid]:
        rows = numbers[self.part.lead]
        rows = self.keys.take(rows) if group.owner == "key" else rows
        return group.spread, group.spread.lay(rows, self.keys)

    def _blank(self, group: Group) -> tuple[Spread, Laid]:
        return group.spread, group.spread.blank(self.q, len(self.q), self.keys)

    def _probabilities(self, tile: Tile) -> Tensor:
        """``[n, rows, keys]`` in memory that the next tile overwrites."""
        logits = self.given.space("logits", tile)
        self._product(logits, self.terms, tile, self.q[:, tile.rows], self.k)
        dead = self.given.tiles.hide(logits, tile)
        torch.softmax(logits, -1, out=logits)
        if dead is not None:
            logits.view(tile.shape).masked_fill_(dead, 0.0)
        return logits

    def _product(
        self, out: Tensor, terms: Sequence[tuple[Spread, Laid]], tile: Tile, x: Tensor, y: Tensor
    ) -> None:
        """``out = x @ y^T`` and what the terms add."""
        for number, (spread, laid) in enumerate(terms):
            space = out if number == 0 else self.given.space("more", tile)
            spread.write(space, laid, tile)
            if number > 0:
                out += space
        y = _first(y, tile).transpose(1, 2)
        if terms:
            out.baddbmm_(x, y)
        else:
            torch.bmm(x, y, out=out)


def _first(x: Tensor, tile: Tile) -> Tensor:
    """The keys of a tile in ``[n, keys, D]``."""
    return x if x.shape[1] == tile.count else x[:, : tile.count]


# A product into memory with gaps would go head by head.


def _into(out: Tensor, x: Tensor, y: Tensor) -> None:
    """``out = x @ y``."""
    if out.is_contiguous():
        torch.bmm(x, y, out=out)
    else:
        out.copy_(torch.bmm(x, y))


def _add(out: Tensor, x: Tensor, y: Tensor) -> None:
    """``out += x @ y``."""
    if out.is_contiguous():
        out.baddbmm_(x, y)
    else:
        out += torch.bmm(x, y)
