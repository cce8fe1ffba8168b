"""Which pattern the tokens of a call make, and its terms in groups."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...terms import Kind
from .groups import Group, Plan
from .spread import Pattern

OWNERS: dict[Kind, Kind] = {"bias": "query", "query": "query", "key": "key", "value": "value"}


def grouped(
    plan: Plan, tables: Sequence[Tensor], device: torch.device, is_causal: bool
) -> tuple[Pattern, list[Group]]:
    """The pattern of all tokens, and the terms by what they look up."""
    pattern = Pattern()
    groups: dict[object, Group] = {}
    for i, (kind, buckets) in enumerate(plan):
        owner = OWNERS[kind]
        key, make, places = pattern.spread(buckets, owner, device)
        if (owner, key) not in groups:
            groups[owner, key] = Group(owner, make(), tables)
        groups[owner, key].members.append((i, kind, places))
    return pattern, list(groups.values())
