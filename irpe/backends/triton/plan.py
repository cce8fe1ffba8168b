"""A call with terms, as rows of numbers: all that is left to a kernel is to gather and to scatter.

What meets a query is one product ahead of the kernel, rows ``q table``; the value term is one
product after it, ``mass table``. Both are torch's, and so are their gradients.

Shapes: maps of N padded buckets each, laid side by side in rows of W = maps * N numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...buckets import BucketIds
from ...terms import Kind, Term
from .strips import places, width

TILE = 128  # the largest block of queries or keys of a kernel


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Maps of a call, and its tables side by side.

    Args:
        maps: distinct maps of ids; one serves both directions where opposite offsets allow it.
        width: N. tables: for each kind ``[H | 1, W]`` or ``[H | 1, D, W]`` (value:
            ``[H | 1, W, E]``). uses: for each kind a bit mask of the maps that it uses.
    """

    maps: tuple[BucketIds, ...]
    width: int
    tables: dict[Kind, Tensor]
    uses: dict[Kind, int]

    def ids(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Compact ids ``[maps, 1 | B, L', S']`` and transposed, padded to whole tiles."""
        geometry = self.maps[0].geometry

        def build(turned: bool) -> Tensor:
            parts = [m.compact(device) for m in self.maps]
            batch = max(p.shape[0] for p in parts)
            ids = torch.stack([p.expand(batch, -1, -1) for p in parts])
            ids = ids.transpose(-2, -1) if turned else ids
            return F.pad(ids, (0, -ids.shape[-1] % TILE, 0, -ids.shape[-2] % TILE))

        if any(m.geometry is not geometry for m in self.maps):
            return build(False), build(True)
        key = ("maps", tuple((m.function, m.by_key) for m in self.maps), device)
        return (
            geometry.remember((*key, False), lambda: build(False)),
            geometry.remember((*key, True), lambda: build(True)),
        )


def plan_strips(terms: Sequence[Term]) -> Plan:
    """Tables of the same kind, laid out as strips.py has it, add up."""
    tables: dict[Kind, Tensor] = {}
    for term in terms:
        axis = 1 if term.kind == "value" else -1
        table = _reversed(term, axis) if term.buckets.by_key else term.table
        # In float32, for the gradient: some numbers stand in several places.
        table = table.float().index_select(axis, places(term.buckets, table.device))
        tables[term.kind] = table + tables[term.kind] if term.kind in tables else table
    dtype = terms[0].table.dtype
    tables = {kind: table.to(dtype) for kind, table in tables.items()}
    return Plan((), width(terms[0].buckets), tables, dict.fromkeys(tables, 1))


def plan(terms: Sequence[Term]) -> Plan:
    """Sort terms by map and kind; tables of the same kind and map add up."""
    maps: list[BucketIds] = []
    placed: list[tuple[Term, int, bool]] = []
    for term in terms:
        buckets, turned = term.buckets, False
        opposite = getattr(buckets.function, "opposite", None)
        if buckets.by_key and opposite is not None:
            buckets = BucketIds(buckets.function, buckets.geometry)
            turned = opposite == "reversed"
        at = next((n for n, known in enumerate(maps) if _same(known, buckets)), len(maps))
        if at == len(maps):
            maps.append(buckets)
        placed.append((term, at, turned))
    wide = max([16, *(-(-m.size // 16) * 16 for m in maps)])
    parts: dict[Kind, list[Tensor | None]] = {}
    for term, at, turned in placed:
        axis = 1 if term.kind == "value" else -1
        table = _reversed(term, axis) if turned else term.table
        spare = wide - term.buckets.size
        table = F.pad(table, (0, 0, 0, spare) if axis == 1 else (0, spare))
        slots = parts.setdefault(term.kind, [None] * len(maps))
        held = slots[at]
        join = torch.mul if term.kind == "gain" else torch.add
        slots[at] = table if held is None else join(held, table)
    tables, uses = {}, {}
    for kind, slots in parts.items():
        uses[kind] = sum(1 << m for m, slot in enumerate(slots) if slot is not None)
        tables[kind] = _beside(slots, 1 if kind == "value" else -1)
    return Plan(tuple(maps), wide, tables, uses)


def rows(x: Tensor, table: Tensor) -> Tensor:
    """``[B, H, R, D]`` times ``[H | 1, D, W]``, laid out as ``[H, B, R, W]``."""
    B, H, R, D = x.shape
    flat = x.transpose(0, 1).reshape(H, B * R, D)  # no copy of a projection's output
    return torch.bmm(flat, table.expand(H, -1, -1)).view(H, B, R, table.shape[-1])


def mixed(mass: Tensor, table: Tensor) -> Tensor:
    """``[H, B, L, W]`` times ``[H | 1, W, E]``: ``[B, H, L, E]``."""
    H, B, L, W = mass.shape
    out = torch.bmm(mass.view(H, B * L, W), table.expand(H, -1, -1))
    return out.view(H, B, L, table.shape[-1]).transpose(0, 1)


def like(x: Tensor) -> Tensor:
    """Empty ``[B, H, R, D]``, laid out as the projection that follows or precedes wants it."""
    B, H, R, D = x.shape
    return x.new_empty(B, R, H, D).transpose(1, 2)


def _same(a: BucketIds, b: BucketIds) -> bool:
    return a.geometry is b.geometry and a.function == b.function and a.by_key == b.by_key


def _reversed(term: Term, axis: int) -> Tensor:
    """A table for opposite offsets; the bucket of prefix tokens stays the last."""
    size = term.buckets.function.size
    return torch.cat(
        (
            term.table.narrow(axis, 0, size).flip(axis),
            term.table.narrow(axis, size, term.buckets.size - size),
        ),
        axis,
    )


def _beside(slots: list[Tensor | None], axis: int) -> Tensor:
    some = next(s for s in slots if s is not None)
    heads = max(s.shape[0] for s in slots if s is not None)
    full = [torch.zeros_like(some) if s is None else s for s in slots]
    if len(full) == 1:
        return full[0]
    return torch.cat([s.expand(heads, *s.shape[1:]) for s in full], axis)
