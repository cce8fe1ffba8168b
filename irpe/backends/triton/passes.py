"""Forward and backward of a call: products with the tables around the launches of the kernels.

A product before the kernel, ``q @ table``, gives each query (and key) a row of W numbers to be
gathered; a product after it, ``mass @ table``, gives the value term.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...terms import Kind
from .launch import launcher
from .ops import empty_like, empty_outputs
from .plan import Plan, plan_of, span

OFFSETS = 2**31  # of int32


def forward(
    q: Tensor, k: Tensor, v: Tensor, tables: Sequence[Tensor], given: Sequence[Tensor | None],
    code: Sequence[int], floats: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    """Return out, stats, and those that exist of rows, columns and mass; see ``ops.outputs``."""
    plan, scale, H = plan_of(tuple(code), q.device), floats[1], q.shape[1]
    wide, on_grid = plan.maps * plan.width, plan.side > 0
    found = empty_outputs(q, k, v, tables, plan.kinds, wide, on_grid)
    combined = {kind: plan.combine(tables, kind, q.dtype) for kind in plan.combined}
    q, k, v = _unit(q), _unit(k), _unit(v)
    out, stats = found[:2]
    rows, columns, mass = _named(plan, found[2:])
    if rows is not None:
        _fill_rows(rows, q, plan, tables, combined, scale)
    if columns is not None:
        table = _expanded(combined["key"], H)
        columns.flatten(1, 2).baddbmm_(_flat(_repeated(k, H)), table, beta=0, alpha=scale)
    launches = launcher((q, k, v), rows, given, plan, floats)
    shared = {"stats": stats, "rows": rows, "columns": columns}
    launches.start(plan, given, "forward", {"q": q, "k": k, "v": v, "out": out}, shared)
    if mass is not None:
        shared["sums"] = sums = torch.zeros(mass.shape, dtype=torch.float32, device=q.device)
        launches.start(plan, given, "mass", {"q": q, "k": k}, shared, MASS=plan.mass_use)
        mass.copy_(sums)
        _flat(out).baddbmm_(mass.flatten(1, 2), _expanded(combined["value"], H))
    return [*found, *combined.values()]


def backward(
    grad: Tensor, qkv: Sequence[Tensor], tables: Sequence[Tensor], given: Sequence[Tensor | None],
    saved: Sequence[Tensor], code: Sequence[int], floats: Sequence[float], wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of q, k, v, and of the tables that want one."""
    grads = [empty_like(x.shape, x) for x in qkv]
    q, k, v, grad = (_unit(x) for x in (*qkv, grad))
    plan, scale, H, dtype = plan_of(tuple(code), q.device), floats[1], q.shape[1], q.dtype
    asked = {kind for kind, want in zip(plan.kinds, wanted, strict=True) if want}
    out, stats = saved[:2]
    rows, columns, mass = _named(plan, saved[2:])
    combined = dict(zip(plan.combined, saved[len(saved) - len(plan.combined) :], strict=True))
    flow_rows = flow_columns = flow_mass = None
    if rows is not None and ("query" in plan.kinds or "bias" in asked):
        shape = (H, q.shape[0], q.shape[2], rows.shape[-1])
        flow_rows = torch.zeros(shape, dtype=torch.float32, device=q.device)
    if columns is not None:
        flow_columns = torch.zeros(columns.shape, dtype=torch.float32, device=q.device)
    if mass is not None:
        flow_mass = torch.bmm(_flat(grad), _expanded(combined["value"], H).mT)

    launches = launcher((q, k, v, grad), rows, given, plan, floats, wanted)
    shared = {
        "stats": stats, "rows": rows, "columns": columns, "grad_mass": flow_mass,
        "delta": torch.empty(stats.shape[1:], dtype=torch.float32, device=q.device),
        "grad_rows": flow_rows, "grad_columns": flow_columns,
    }  # fmt: skip
    read = {"q": q, "k": k, "v": v, "grad": grad}
    launches.start(
        plan, given, "row_pass", read | {"out": out, "grad_q": grads[0]}, shared,
        MASS=plan.mass_use, GRAD_ROWS=0 if flow_rows is None else plan.row_use,
    )  # fmt: skip
    launches.start(
        plan, given, "column_pass", read | {"grad_k": grads[1], "grad_v": grads[2]}, shared,
        MASS=plan.mass_use, GRAD_COLUMNS=plan.column_use,
    )  # fmt: skip

    found: dict[Kind, Tensor] = {}
    if flow_rows is not None and "bias" in asked:
        found["bias"] = flow_rows.sum((1, 2))
    if flow_rows is not None and "query" in plan.kinds:
        flow = flow_rows.to(dtype).flatten(1, 2)
        table = _expanded(combined["query"], H)
        _flat(grads[0]).baddbmm_(flow, table.mT, alpha=scale)
        if "query" in asked:
            found["query"] = torch.bmm(_flat(q).mT, flow)
    if flow_columns is not None:
        flow = flow_columns.to(dtype).flatten(1, 2)
        table = _expanded(combined["key"], H)
        if "key" in asked:
            found["key"] = torch.bmm(_flat(_repeated(k, H)).mT, flow)
        if k.shape[1] == H:
            _flat(grads[1]).baddbmm_(flow, table.mT, alpha=scale)
        else:
            more = torch.bmm(flow, table.mT).mul_(scale).unflatten(1, (k.shape[0], -1))
            grads[1] += more.transpose(0, 1).unflatten(1, (k.shape[1], -1)).sum(2)
    if mass is not None and "value" in asked:
        found["value"] = torch.bmm(mass.flatten(1, 2).mT, _flat(grad))
    for at, (kind, want) in enumerate(zip(plan.kinds, wanted, strict=True)):
        if want:
            factor = scale if kind in ("query", "key") else 1.0
            grads.append(plan.reduce(found[kind], tables[at], at, factor))
    return grads


def _fill_rows(
    rows: Tensor, q: Tensor, plan: Plan, tables: Sequence[Tensor], combined: dict[Kind, Tensor],
    scale: float,
) -> None:  # fmt: skip
    """Fill the rows of queries, ``[H, B, L, W]`` or, of a bias alone, ``[H | 1, W]``."""
    if "query" not in plan.kinds:
        rows.copy_(plan.combine(tables, "bias", rows.dtype))
        return
    flat, table = _flat(q), _expanded(combined["query"], q.shape[1])
    if "bias" not in plan.kinds:
        rows.flatten(1, 2).baddbmm_(flat, table, beta=0, alpha=scale)
        return
    torch.mul(torch.bmm(flat, table).view(rows.shape), scale, out=rows)
    rows += plan.combine(tables, "bias", rows.dtype)[:, None, None]


def _expanded(table: Tensor, heads: int) -> Tensor:
    """Return ``[H | 1, ...]`` for all heads."""
    return table if table.shape[0] == heads else table.expand(heads, -1, -1)


def _flat(x: Tensor) -> Tensor:
    """Return ``[B, H, R, D]`` as ``[H, B * R, D]``: a view, where ``empty_like`` made it."""
    return x.transpose(0, 1).flatten(1, 2)


def _repeated(k: Tensor, heads: int) -> Tensor:
    """Return k with as many heads as q."""
    groups = heads // k.shape[1]
    return k if groups == 1 else k.repeat_interleave(groups, 1)


def _named(plan: Plan, found: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Return rows, columns and mass from those that exist, None for the others."""
    left = iter(found)
    uses = (plan.row_use, plan.column_use, plan.mass_use)
    return tuple(next(left) if use else None for use in uses)


def _unit(x: Tensor) -> Tensor:
    """Return ``[B, H, R, D]``, copied where its strides are not those of a kernel.

    Its last stride is 1, and offsets in a head are int32: a projection whose tokens come first has
    strides of B * H * D numbers.
    """
    plain = x.stride(3) == 1 or x.shape[3] == 1
    return x if plain and span(x) < OFFSETS else x.contiguous()
