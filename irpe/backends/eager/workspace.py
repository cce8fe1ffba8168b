"""What the tiles of a pass share: the inputs, the division into tiles, and buffers."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...buckets import BucketIds
from ...terms import Kind
from ..call import Call
from .blocks import Blocks
from .rows import Layout, Table
from .tile import Tile, Tiles

SIZE = 2**19  # numbers of a tile for each thread: twice as many take 0.94 to 1.23 times as long


@dataclass(frozen=True, slots=True)
class Plan:
    """A call without its tensors.

    Args:
        call: the call, with empty tensors.
        terms: kind and buckets of each term.
        layout: layout of the tokens; None: unknown.
        kept: whether probabilities are kept for the backward pass.
        threads: number of threads that share a tile, in both passes.
        seed: seed of the dropout; None: no dropout.
    """

    call: Call
    terms: Sequence[tuple[Kind, BucketIds]]
    layout: Layout | None
    kept: bool
    threads: int
    seed: int | None


class Workspace:
    """Inputs and buffers of a pass, in float32 or float64.

    Args:
        plan: plan of the call.
        inputs: q, k and v with equal numbers of heads, and the tables of the terms.
    """

    def __init__(self, plan: Plan, inputs: Sequence[Tensor]) -> None:
        self.plan, (q, k), call = plan, inputs[:2], plan.call
        wide = torch.promote_types(q.dtype, torch.float32)
        # Scale and make contiguous in one pass over memory.
        self.q = torch.mul(q.detach(), call.scale, out=q.new_empty(q.shape, dtype=wide))
        self.k, self.v, *self.tables = (x.detach().to(wide).contiguous() for x in inputs[1:])
        self.shape = (*q.shape[:3], k.shape[2])
        # Indices of terms that gather rows of numbers, and of value terms.
        self.rows, self.values = list[int](), list[int]()
        self.dense: list[tuple[Kind, BucketIds, Tensor]] = []
        for i, (kind, buckets) in enumerate(plan.terms):
            if kind in ("query", "key") or (kind == "bias" and self.blocks(i) is not None):
                self.rows.append(i)
            elif kind == "value":
                self.values.append(i)
            else:
                self.dense.append((kind, buckets, self.tables[i]))
        self.channels = any(kind == "channels" for kind, *_ in self.dense)
        self.slopes = any(kind == "slope" for kind, *_ in self.dense)
        self.least = torch.finfo(wide).tiny ** 0.75
        # Images share dense numbers: they are gathered once where one tile is the whole call.
        whole = plan.kept and bool(self.dense)
        size = q.numel() * k.shape[2] if whole else SIZE * plan.threads
        if self.channels:
            size = SIZE * plan.threads // q.shape[3]
        call, threads = replace(call, q=q, k=k), plan.threads
        self.tiles = Tiles(call, plan.layout, size, self._columns(), threads, plan.kept)
        self.draws: torch.Generator | None = None
        if plan.seed is not None:
            self.draws = torch.Generator(q.device).manual_seed(plan.seed)
        self.rest = 1.0 - call.dropout_p
        self.growth = 1.0 / self.rest if self.rest else 1.0  # scale of kept probabilities
        self._memory: dict[str, Tensor] = {}
        self.ways: dict[int, Blocks] = {}  # of the last part, by term

    def of_key(self, i: int) -> bool:
        """Return whether a term's rows of numbers belong to keys."""
        return self.plan.terms[i][0] == "key"

    def blocks(self, i: int) -> Table | None:
        """Return a term's blocks; None if it has none."""
        layout, (_, buckets) = self.plan.layout, self.plan.terms[i]
        return None if layout is None else layout.blocks(buckets, self.of_key(i))

    def keep(self) -> Tensor:
        """Return the dropout mask ``[B, H, L, S]``: 1 if kept or in no tile, else 0."""
        every = self.q.new_ones(self.shape)
        for tile in itertools.chain(*self.tiles.parts):
            own = every[tile.images, tile.heads, tile.rows]
            kept = self.drawn(tile).view(tile.shape)
            if tile.index is None:
                own[..., : tile.count] = kept
            else:
                own.index_copy_(-1, tile.index, kept)
        return every

    def drawn(self, tile: Tile) -> Tensor:
        """Return the dropout mask of a tile; called once for each tile, in order."""
        return self.space("keep", tile.flat).bernoulli_(self.rest, generator=self.draws)

    def space(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return a buffer that later calls with this name reuse."""
        size = math.prod(shape)
        if name not in self._memory or self._memory[name].numel() < size:
            self._memory[name] = self.q.new_empty(size)
        return self._memory[name][:size].view(shape)

    def blank(self, x: Tensor) -> Tensor:
        """Return x, filled with zeros unless a single tile overwrites it."""
        return x if self.tiles.one and not self.channels else x.zero_()

    def _columns(self) -> int:
        """Return the number of columns of queries for which blocks of keys are gathered at once.

        These blocks have at most four times the size of a tile (with twice, 64x64 tokens take 1.5
        times as long), or the size of the rows of numbers.
        """
        most, terms = self.shape[2], [i for i in self.rows if self.of_key(i)]
        for i, found in zip(terms, map(self.blocks, terms), strict=True):
            if found is not None:
                deep, size = len(found[0]), self.plan.terms[i][1].size
                room = 4 * SIZE * self.plan.threads // self.shape[3]
                most = min(most, max(1, size // deep, room // deep))
        return most
