"""A part of a pass: the tiles of the same images, heads, keys and columns of queries."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import Blocks
from .dense import add_biases, back_biases, by_channels, gain_of
from .gather import ByMap, put
from .tile import Tile
from .workspace import Workspace


class Part:
    """One part of a pass.

    Args:
        work: inputs and buffers.
        part: tiles of the same images, heads and keys.
        numbers: rows that the logits gather from; empty if probabilities are kept.
    """

    def __init__(self, work: Workspace, part: list[Tile], numbers: Sequence[Tensor]) -> None:
        self.work, self.part, self.index, self.dense = work, part, part[0].index, work.dense
        self.q, self.k, self.v = (self._own(x) for x in (work.q, work.k, work.v))
        if self.index is not None:
            self.k, self.v = (x.index_select(1, self.index) for x in (self.k, self.v))
        self.rows = [self._way(i) for i in work.rows]
        self.masses = [self._way(i) for i in work.values]
        for way, x in zip(self.rows, numbers, strict=False):
            way.read(self._own(x))

    def forward(self, out: Tensor, masses: Sequence[Tensor], kept: list[Tensor] | None) -> None:
        """Write the output ``[B, H, L, E]`` and the masses ``[B, H, L, N]``."""
        out = self._own(out)
        for way, mass in zip(self.masses, masses, strict=True):
            way.write(self._own(mass))
        for tile in self.part:
            probabilities = self._probabilities(tile, kept)
            if self.work.draws is not None:
                keep = self.work.drawn(tile)
                probabilities = torch.mul(probabilities, keep, out=keep)
            _product(out[:, tile.rows], probabilities, self.v[:, : tile.count], False)
            for way in self.masses:
                way.scatter(probabilities, tile)
        for way in self.masses:
            way.collect()

    def backward(
        self,
        grad: Tensor,
        of_masses: Sequence[Tensor],
        grads: Sequence[Tensor],
        sums: Sequence[Tensor],
        kept: Iterator[Tensor],
    ) -> None:
        """Write gradients of q, k and v, and of the rows of numbers.

        Args:
            grad: gradient of the output.
            of_masses: gradients of the masses.
            grads: buffers for gradients of q, k and v, ``[B, H, L | S, D]``.
            sums: buffers for gradients of the rows of numbers, ``[B, H, L | S, N]``.
            kept: the probabilities of each tile; empty: they are recomputed.
        """
        work, several = self.work, not self.work.tiles.one
        grad, own_q, own_k, own_v = self._own(grad), *(self._own(x) for x in grads)
        if self.index is not None:
            own_k, own_v = torch.zeros_like(self.k), torch.zeros_like(self.v)
        for way, x in zip(self.masses, of_masses, strict=True):
            way.read(self._own(x))
        for way, x in zip(self.rows, sums, strict=True):
            way.write(self._own(x))
        for tile in self.part:
            probabilities = next(kept, None)
            if probabilities is None:
                probabilities = self._probabilities(tile, None)
            own, grad_logits = grad[:, tile.rows], work.space("grad_logits", tile.flat)
            dropped, keep = probabilities, None
            if work.draws is not None:
                keep = work.drawn(tile)
                dropped = torch.mul(probabilities, keep, out=grad_logits)
            _product(own_v[:, : tile.count], dropped.transpose(1, 2), own, several)
            for number, way in enumerate(self.masses):
                way.gather(grad_logits, tile, number > 0)
            _product(grad_logits, own, self.v[:, : tile.count].transpose(1, 2), bool(self.masses))
            if keep is not None:
                grad_logits.mul_(keep)
            # Until here the gradient of the probabilities.
            torch.ops.aten._softmax_backward_data.out(
                grad_logits, probabilities, -1, grad_logits.dtype, grad_input=grad_logits
            )
            for way in self.rows:
                way.scatter(grad_logits, tile)
            self._back_pairs(grad_logits, tile)
            q, k = self.q[:, tile.rows], self.k[:, : tile.count]
            if work.channels:
                q, k = (x.detach().requires_grad_() for x in (q, k))
                with torch.enable_grad():
                    content = by_channels(self.dense, q, k, tile)
                content.backward(grad_logits)
                assert q.grad is not None and k.grad is not None
                own_q[:, tile.rows] = q.grad
                own_k[:, : tile.count].add_(k.grad)
            else:
                _product(own_q[:, tile.rows], grad_logits, k, False)
                _product(own_k[:, : tile.count], grad_logits.transpose(1, 2), q, several)
        for way in self.rows:
            way.collect()
        if self.index is not None:
            self._own(grads[1]).index_add_(1, self.index, own_k)
            self._own(grads[2]).index_add_(1, self.index, own_v)

    def _back_pairs(self, grad_logits: Tensor, tile: Tile) -> None:
        """Accumulate the gradients of dense tables, and multiply ``grad_logits`` by gains."""
        grad_logits = grad_logits.view(tile.shape)
        back_biases(self.dense, grad_logits, tile)
        with torch.enable_grad():
            gain = gain_of(self.dense, tile)
        if gain is not None and gain.requires_grad:
            content = self._content(self.work.space("content", tile.flat), tile, False)
            gain.backward((content.view(tile.shape) * grad_logits).sum_to_size(gain.shape))
        if gain is not None:
            grad_logits.mul_(gain.detach())

    def _probabilities(self, tile: Tile, kept: list[Tensor] | None) -> Tensor:
        """Return ``[n, rows, keys]``; unless kept, in a buffer that the next tile overwrites."""
        if kept is None:
            logits = self.work.space("logits", tile.flat)
        else:
            logits = self.q.new_empty(tile.flat)
            kept.append(logits)
        wide, add = logits.view(tile.shape), bool(self.dense)
        if add:
            # Products are up to 3 times slower where they are added to numbers.
            self._content(logits, tile, False)
            gain = gain_of(self.dense, tile)
            if gain is not None:
                wide.mul_(gain)
            add_biases(self.dense, wide, tile)
        for way in self.rows:
            way.gather(logits, tile, add)
            add = True
        if not self.dense:
            self._content(logits, tile, add)
        dead = self.work.tiles.hide(logits, tile)
        torch.softmax(logits, -1, out=logits)
        if self.work.slopes:
            # Far keys have subnormal probabilities, which make products 4 times slower.
            F.threshold(logits, self.work.least, 0.0, inplace=True)
        if dead is not None:
            wide.masked_fill_(dead, 0.0)
        return logits

    def _content(self, out: Tensor, tile: Tile, add: bool) -> Tensor:
        q, k = self.q[:, tile.rows], self.k[:, : tile.count]
        if self.work.channels:
            put(out, by_channels(self.dense, q, k, tile), add)
        else:
            _product(out, q, k.transpose(1, 2), add)
        return out

    def _way(self, i: int) -> ByMap | Blocks:
        work, blocks = self.work, self.work.blocks(i)
        if work.plan.layout is None or blocks is None:
            return ByMap(work.plan.terms[i][1], self.q.device)
        way, part = work.ways.get(i), self.part[0]
        if way is None or way.index is not part.index or way.part != part.columns:

            def space(name: str, shape: Sequence[int]) -> Tensor:
                return work.space(f"{name} of {i}", shape)

            way = Blocks(work.plan.layout, blocks, work.of_key(i), part, space)
            work.ways[i] = way
        return way

    def _own(self, x: Tensor) -> Tensor:
        """Return the part of ``[B, H, R, ...]`` as ``[n, R, ...]``."""
        return x[self.part[0].images, self.part[0].heads].flatten(0, 1)


def _product(out: Tensor, x: Tensor, y: Tensor, add: bool) -> None:
    """Write ``x @ y`` to out, or add it."""
    if out.is_contiguous():
        out.baddbmm_(x, y, beta=int(add))
    else:
        put(out, torch.bmm(x, y), add)
