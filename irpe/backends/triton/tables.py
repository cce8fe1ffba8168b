"""Lists of addresses by which table_kernels.py reads tables and writes their gradients."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...cache import remembered
from .plan import KINDS, Plan
from .strips import share


class Lists(NamedTuple):
    """What the tables of a call look like, on its device; see table_kernels.py.

    Args:
        sources: int32 ``[SOURCES, 3, count]``.
        plain: rows of query, key and value tables among them.
        targets: int32 ``[7, buckets]``.
        members: int32 ``[places, buckets]``.
    """

    sources: Tensor
    plain: int
    targets: Tensor
    members: Tensor


def lists(plan: Plan, tables: Sequence[Tensor], heads: int, device: torch.device) -> Lists:
    """Return the lists for tables of these shapes, built once."""
    shapes = tuple(t.shape for t in tables)
    return remembered(("tables", plan, shapes, heads), lambda: _lists(plan, shapes, heads, device))


def _lists(plan: Plan, shapes: Sequence[Sequence[int]], H: int, device: torch.device) -> Lists:
    wide = plan.maps * plan.width
    kinds = [kind for kind in (*KINDS[1:], "bias") if kind in plan.kinds]
    places = {kind: n for n, kind in enumerate(kinds)}
    shares = {"query": 0, "value": int("query" in kinds), "key": 2, "bias": 3}
    depth = max(plan.kinds.count(kind) for kind in kinds)
    sources = torch.full((depth, 3, len(kinds), H, wide), 0)
    sources[:, 0] = -1
    used = dict.fromkeys(kinds, 0)
    targets, members, first = [], [], 0
    for kind, shape, place in zip(plan.kinds, shapes, plan.places, strict=True):
        heads, channels, step = shape[0], 1, 1
        size = shape[1] if kind in ("bias", "value") else shape[2]
        if kind == "value":
            channels = shape[2]
        elif kind != "bias":
            channels, step = shape[1], size
        bucket = torch.arange(size) * (channels if kind == "value" else 1)
        at = first + torch.arange(heads).unsqueeze(1) * (channels * size) + bucket
        own = sources[used[kind], :, places[kind]]
        own[0] = torch.where(place < 0, -1, at[:, place.clamp(min=0)])
        own[1], own[2] = step, channels
        used[kind] += 1
        # Places of each bucket in a share: those of equal ids are neighbours once they are sorted.
        in_share = torch.arange(wide)
        if plan.side and kind != "key":
            in_share = share(wide, plan.side)
            place = torch.where(in_share < 0, -1, place)
        counts = torch.bincount(place[place >= 0], minlength=size)
        sorted_places = place.argsort(stable=True)[int((place < 0).sum()) :]
        index = counts.cumsum(0) - counts + torch.arange(int(counts.max())).unsqueeze(1)
        index = index.clamp(max=len(sorted_places) - 1)
        members.append(in_share[sorted_places[index]].repeat(1, heads))
        head = torch.arange(heads).unsqueeze(1)
        rows = (at, step, channels, shares[kind], head, H // heads, counts)
        targets.append(torch.stack([torch.as_tensor(x).expand(heads, size) for x in rows]))
        first += heads * channels * size
    most = max(len(m) for m in members)
    padded = [torch.nn.functional.pad(m, (0, 0, 0, most - len(m))) for m in members]
    plain = (len(kinds) - ("bias" in kinds)) * H * wide

    def sent(x: Tensor) -> Tensor:
        return x.to(device, torch.int32).contiguous()

    return Lists(
        sent(sources.flatten(2)), plain, sent(torch.cat([t.flatten(1) for t in targets], 1)),
        sent(torch.cat(padded, 1)),
    )  # fmt: skip
