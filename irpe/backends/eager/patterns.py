"""Which pattern the tokens of a call make, and its terms in groups."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...geometry import Geometry, Grid
from ...terms import Kind
from .band import line
from .groups import Group, Plan
from .runs import WholeGrid
from .spread import Pattern

OWNERS: dict[Kind, Kind] = {"bias": "query", "query": "query", "key": "key", "value": "value"}


def grouped(
    plan: Plan, tables: Sequence[Tensor], device: torch.device, is_causal: bool
) -> tuple[Pattern, list[Group]]:
    """The pattern of all tokens, and the terms by what they look up."""
    pattern = pattern_of([buckets.geometry for _, buckets in plan], is_causal)
    groups: dict[object, Group] = {}
    for i, (kind, buckets) in enumerate(plan):
        owner = OWNERS[kind]
        key, make, places = pattern.spread(buckets, owner, device)
        if (owner, key) not in groups:
            groups[owner, key] = Group(owner, make(), tables)
        groups[owner, key].members.append((i, kind, places))
    return pattern, list(groups.values())


def pattern_of(geometries: Sequence[Geometry], is_causal: bool) -> Pattern:
    """What all tokens have in common."""
    if not geometries or any(other is not geometries[0] for other in geometries):
        return Pattern()
    geometry = geometries[0]
    in_line = geometry.remember("line", lambda: line(geometry))
    if in_line is not None:
        return in_line
    if isinstance(geometry, Grid) and geometry.whole and not is_causal:
        return WholeGrid(geometry)
    return Pattern()
