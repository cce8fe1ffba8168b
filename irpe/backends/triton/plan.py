"""Plans: what the kernels read about the pairs of queries and keys, the same for equal shapes.

A call is described by a list of integers (``encode``), which an operator of torch can take and
torch.compile can trace. From this code the operator builds a ``Plan`` once, see ops.py; where
positions were given, the maps of bucket ids are tensors of the call instead.

Shapes: maps of N padded buckets each, side by side in rows of W = maps * N numbers.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...buckets import BucketIds
from ...buckets.ids import FUNCTIONS, number_of
from ...cache import remembered
from ...geometry import Geometry, Grid, Sequence
from ...terms import Kind, Term
from ..call import Call
from . import strips

TILE = 128  # the largest block of queries or keys of a kernel: maps are padded to whole blocks
CPU = torch.device("cpu")
KINDS: tuple[Kind, ...] = ("bias", "query", "key", "value")
GEOMETRIES: tuple[type[Geometry], ...] = (Sequence, Grid)  # whole ones are described by their sizes


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Tensors and settings that calls of equal shapes and terms share.

    With strips, tokens are read by slot, see strips.py; without them a slot is a token.

    Args:
        kinds: of the tables.
        places: for each table the place in it of each of the W numbers, int64 ``[W]`` on a CPU; -1
            where a number is 0.
        is_causal: query i sees the keys j <= i + S - L.
        width: N.
        maps: number of maps, at least 1.
        ids: bucket ids ``[maps, 1 | B, L', S']``.
        order: token of each query slot, int32; L in empty ones.
        others: token of each key slot, likewise.
        slots: query slots without those that fill the last tile.
        runs: row part of the bucket of a query slot and a run of the last part, uint8
            ``[slots, runs]``; the other parts have the same ones.
        units: column part of the bucket of a unit and a column, uint8 ``[units, columns]``.
        row_use: bit mask of the maps that rows of queries use.
        column_use: bit mask of the maps that rows of keys use.
        mass_use: bit mask of the maps that value terms use.
        side: numbers of a run; 0 without strips.
        parts: of the key slots, 16 columns each.
        part_slots: slots of a part. The last one holds the prefix tokens besides.
        launchers: by shapes and strides, see launch.py.
    """

    kinds: tuple[Kind, ...]
    places: tuple[Tensor, ...]
    is_causal: bool
    width: int
    maps: int
    ids: Tensor | None
    order: Tensor | None = None
    others: Tensor | None = None
    slots: int = 0
    runs: Tensor | None = None
    units: Tensor | None = None
    row_use: int = 0
    column_use: int = 0
    mass_use: int = 0
    side: int = 0
    parts: int = 1
    part_slots: int = 0
    launchers: dict[tuple, Any] = field(default_factory=dict)

    @property
    def share(self) -> int:
        """Return the rows of a share of query, value and bias tables; see ``strips.share``."""
        if not self.side:
            return self.maps * self.width
        return (self.width // self.side - 1) ** 2 + 1


class Placed(NamedTuple):
    """One term in a code: its map, and the place of its table in it."""

    kind: int
    slot: int  # its map
    turned: int  # its table is for offsets opposite to the map's
    by_key: int  # of the map
    inner: int  # buckets without the one of prefix tokens
    size: int  # buckets
    number: int  # of the bucket function, see ``number_of``; -1 if it has none


class Code(NamedTuple):
    """The integers that describe a call."""

    width: int
    maps: int
    on_grid: int
    is_causal: int
    geometry: int  # index in GEOMETRIES; -1: maps of ids are given
    sizes: tuple[int, ...]  # two of the geometry, and its prefix
    terms: tuple[Placed, ...]

    def pack(self) -> list[int]:
        """Return the list that an operator takes."""
        return [*self[:5], *self.sizes, *(n for term in self.terms for n in term)]

    @staticmethod
    def unpack(packed: Seq[int]) -> "Code":
        """Return what ``pack`` packed, or what ``short`` shortened."""
        packed = SHORT[packed[0]] if len(packed) == 1 else packed
        step = len(Placed._fields)
        terms = tuple(Placed(*packed[n : n + step]) for n in range(8, len(packed), step))
        width, maps, on_grid, is_causal, geometry, *sizes = packed[:8]
        return Code(width, maps, on_grid, is_causal, geometry, tuple(sizes), terms)


SHORT: list[tuple[int, ...]] = []
_PLACES: dict[tuple[int, ...], int] = {}


def short(packed: Seq[int]) -> list[int]:
    """Return a code as one number, which costs a call less, for this process alone."""
    code = tuple(packed)
    if code not in _PLACES:
        SHORT.append(code)
        _PLACES[code] = len(SHORT) - 1
    return [_PLACES[code]]


def encode(call: Call) -> tuple[list[int], Tensor | None]:
    """Return a call's code, and its maps of ids where sizes do not describe its positions."""
    terms = call.terms
    numbers = [_number(term.buckets) for term in terms]
    described = -1 not in numbers and _described(terms)
    on_grid = described and strips.applicable(terms, call.q.dtype, call.is_causal)
    maps: list[BucketIds] = []
    placed = []
    for term, number in zip(terms, numbers, strict=True):
        buckets, turned, slot = term.buckets, term.buckets.by_key, 0
        if not on_grid:
            opposite = getattr(buckets.function, "opposite", None)
            turned = False
            if buckets.by_key and opposite is not None:  # one map for both directions
                buckets, turned = buckets.oriented(False), opposite == "reversed"
            slot = next((n for n, known in enumerate(maps) if _same(known, buckets)), len(maps))
            if slot == len(maps):
                maps.append(buckets)
        sizes = (buckets.function.size, buckets.size)
        flags = (int(turned), int(buckets.by_key))
        placed.append(Placed(KINDS.index(term.kind), slot, *flags, *sizes, number))
    # Rows of 16 numbers start at addresses that a GPU reads in one access.
    width = max([16, *(-(-m.size // 16) * 16 for m in maps)])
    if on_grid:
        width = strips.width(terms[0].buckets)
    whole, sizes3, ids = -1, (0, 0, 0), None
    if described:
        geometry = terms[0].buckets.geometry
        whole = 1 if isinstance(geometry, Grid) else 0
        rows, columns = (*geometry._sizes(), 0)[:2]
        sizes3 = (rows, columns, geometry.prefix)
    elif maps:
        ids = padded_ids(maps, call.q.device)
    code = Code(
        width, max(len(maps), 1), int(on_grid), int(call.is_causal), whole, sizes3, tuple(placed)
    )
    return code.pack(), ids


def _described(terms: Seq[Term]) -> bool:
    """Return whether all terms are for one whole geometry."""
    if not terms:
        return False
    geometry = terms[0].buckets.geometry
    plain = type(geometry) is Grid or type(geometry) is Sequence
    return plain and not geometry.explicit and all(t.buckets.geometry == geometry for t in terms)


def _number(buckets: BucketIds) -> int:
    if buckets.number is not None:
        return buckets.number
    return -1 if torch.compiler.is_compiling() else number_of(buckets.function)


def plan_of(code: tuple[int, ...], device: torch.device) -> Plan:
    """Return the plan of a code, built once; without ids where these are given."""
    return remembered(("plan", code, device), lambda: _plan(Code.unpack(code), device))


def _plan(code: Code, device: torch.device) -> Plan:
    kinds = tuple(KINDS[term.kind] for term in code.terms)
    fields: dict[str, Any] = {"ids": None, "maps": code.maps}
    owners: dict[int, BucketIds] = {}
    if code.geometry >= 0:
        rows, columns, prefix = code.sizes
        of_grid = GEOMETRIES[code.geometry] is Grid
        geometry = Grid(rows, columns, prefix) if of_grid else Sequence(rows, prefix)
        for term in code.terms:
            made = BucketIds(FUNCTIONS[term.number], geometry)
            owners.setdefault(term.slot, made.oriented(bool(term.by_key)))
    if code.on_grid:
        fields |= strips.strips(owners[0], device)
    elif owners:
        maps = [owners[n] for n in range(code.maps)]
        fields["ids"] = _padded_ids(maps, device)
    places = []
    for term in code.terms:
        if code.on_grid:
            function = FUNCTIONS[term.number]
            by_column = KINDS[term.kind] == "key"
            own = strips.places(BucketIds(function, owners[0].geometry), by_column, CPU)
        else:
            own = torch.full((code.maps, code.width), -1)
            own[term.slot, : term.size] = torch.arange(term.size)
            own = own.flatten()
        if term.turned:  # for opposite offsets; the bucket of prefix tokens stays the last
            inside = (own >= 0) & (own < term.inner)
            own = torch.where(inside, term.inner - 1 - own, own)
        places.append(own)
    uses = dict.fromkeys(KINDS, 0)
    for kind, term in zip(kinds, code.terms, strict=True):
        uses[kind] |= 1 << term.slot
    return Plan(
        kinds=kinds, places=tuple(places), is_causal=bool(code.is_causal),
        row_use=uses["bias"] | uses["query"], column_use=uses["key"], mass_use=uses["value"],
        **{"width": code.width, **fields},
    )  # fmt: skip


def padded_ids(maps: Seq[BucketIds], device: torch.device) -> Tensor:
    """Return compact ids ``[maps, 1 | B, L', S']``, padded to whole tiles."""
    geometry = maps[0].geometry
    if any(m.geometry != geometry for m in maps):
        return _padded_ids(maps, device)
    key = ("maps", tuple((m.function, m.by_key) for m in maps), device)
    made: Tensor = geometry.remember(key, lambda: _padded_ids(maps, device))
    return made


def _padded_ids(maps: Seq[BucketIds], device: torch.device) -> Tensor:
    parts = [m.compact(device) for m in maps]
    batch = max(p.shape[0] for p in parts)
    ids = torch.stack([p.expand(batch, -1, -1) for p in parts])
    return F.pad(ids, (0, -ids.shape[-1] % TILE, 0, -ids.shape[-2] % TILE))


def _same(a: BucketIds, b: BucketIds) -> bool:
    return a.geometry == b.geometry and a.function == b.function and a.by_key == b.by_key


def span(x: Tensor) -> int:
    """Return one past the largest offset in the last two axes."""
    return (x.shape[-2] - 1) * x.stride(-2) + (x.shape[-1] - 1) * x.stride(-1) + 1
