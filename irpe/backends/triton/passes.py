"""Forward and backward of a call: the launches of the kernels, and the tensors they share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import launch as starts
from .launch import Launcher, launcher
from .outputs import empty_flat, empty_like, empty_outputs
from .plan import Plan, plan_of, span

OFFSETS = 2**31  # of int32
Shared = dict[str, Tensor | None]


def forward(
    q: Tensor, k: Tensor, v: Tensor, tables: Sequence[Tensor], given: Sequence[Tensor | None],
    code: Sequence[int], floats: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    """Return out, stats, and those that exist of the others; see ``ops.outputs``."""
    plan = plan_of(tuple(code), q.device)
    found = empty_outputs(q, k, v, plan.kinds, plan.maps * plan.width, plan.side > 0)
    q, k, v = _unit(q), _unit(k), _unit(v)
    launches, lists = launcher((q, k, v), given, plan, tables, floats)
    shared = _shared(plan, found, given, launches)
    if lists is not None:
        own: Shared = {
            "flat": _flat(tables), "sources": lists.sources, "tables": shared["tables"],
            "bias": shared["bias"], "q": q,
        }  # fmt: skip
        starts.launch(launches.table_step("prepare", own), own)
    if shared["columns"] is not None:
        starts.launch(launches.step("project", {"k": k}, shared), {**shared, "k": k, "q": q})
    strided = {"q": q, "k": k, "v": v, "out": found[0]}
    step = launches.step("forward", strided, [*shared, "scratch"])
    numbers = step.numbers * plan.maps * plan.width * (plan.mass_use > 0)
    shared["scratch"] = _numbers(q, numbers)
    starts.launch(step, {**shared, **strided})
    return found


def backward(
    grad: Tensor, qkv: Sequence[Tensor], tables: Sequence[Tensor], given: Sequence[Tensor | None],
    saved: Sequence[Tensor], code: Sequence[int], floats: Sequence[float], wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of q, k, v, and of the tables, one after another; none if not wanted."""
    grads = [*(empty_like(x.shape, x) for x in qkv), empty_flat(tables, wanted, qkv[0])]
    q, k, v, grad = (_unit(x) for x in (*qkv, grad))
    plan, want = plan_of(tuple(code), q.device), any(wanted)
    launches, lists = launcher((q, k, v, grad), given, plan, tables, floats, want)
    shared = _shared(plan, saved, given, launches)
    (B, H, L, _), G, wide = q.shape, k.shape[1], plan.maps * plan.width
    shared["grad_mass"] = q.new_empty((H, B, L, wide)) if plan.mass_use else None
    shared["delta"] = q.new_empty((H, B, L), dtype=torch.float32)

    read = {"q": q, "k": k, "v": v, "grad": grad}
    queries = read | {"out": saved[0], "grad_q": grads[0]}
    keys = read | {"grad_k": grads[1], "grad_v": grads[2]}
    others = [*shared, "scratch", "scratch_mass", "shares", "bias_shares"]
    rows = launches.step("row_pass", queries, others)
    columns = launches.step("column_pass", keys, others)
    # Sums by bucket and shares of all programs; the column pass takes the memory of the row pass,
    # so that it all stays in a cache.
    own, biased = "query" in plan.kinds, "bias" in plan.kinds
    of_rows = rows.numbers * wide * (own or (biased and want))
    of_mass = rows.numbers * wide * (plan.mass_use > 0 and want)
    of_columns = columns.numbers * wide * (plan.column_use > 0)
    share, step = plan.share * want, launches.options["STEP"]
    of_shares = columns.programs // G * H * wide * want * step * (plan.column_use > 0)
    memory = _numbers(q, max(of_rows + of_mass, of_columns + of_shares))
    row_shares = _numbers(q, rows.programs * share * step * (own + (plan.mass_use > 0)))
    bias_shares = _numbers(q, rows.programs * share * biased)
    column_shares = _part(memory, of_columns, of_shares)
    shared |= {
        "scratch": _part(memory, 0, of_rows), "scratch_mass": _part(memory, of_rows, of_mass),
        "shares": row_shares, "bias_shares": bias_shares,
    }  # fmt: skip
    starts.launch(rows, {**shared, **queries})
    shared |= {"scratch": _part(memory, 0, of_columns), "shares": column_shares}
    starts.launch(columns, {**shared, **keys})
    if want and lists is not None:
        shares = {
            "row_shares": row_shares, "column_shares": column_shares, "bias_shares": bias_shares,
        }  # fmt: skip
        # Of the dtype of those that are missing; an empty batch has none.
        spare = next((x for x in shares.values() if x is not None), None)
        last: Shared = {name: spare if x is None else x for name, x in shares.items()}
        last |= {"flat": grads[3], "targets": lists.targets, "members": lists.members, "q": q}
        starts.launch(launches.table_step("reduce", last), last)
    return grads


def _shared(
    plan: Plan, found: Sequence[Tensor], given: Sequence[Tensor | None], launches: Launcher
) -> Shared:
    """Return tensors by the names that kernels have for them, None: missing."""
    left, kinds = iter(found[1:]), {*plan.kinds}
    stats = next(left)
    tables = next(left) if kinds - {"bias"} else None
    bias = next(left) if "bias" in kinds else None
    rows = next(left) if "query" in kinds else bias
    columns = next(left) if "key" in kinds else None
    shared = {
        "stats": stats, "tables": tables, "bias": bias, "rows": rows, "columns": columns,
        "mask": given[0], "seed": given[1], **launches.held,
    }  # fmt: skip
    if plan.ids is None:
        shared["ids"] = given[2]
    return shared


def _numbers(like: Tensor, count: int) -> Tensor | None:
    """Return float32 numbers that are not set; None without any: an empty tensor takes time too."""
    return like.new_empty(count, dtype=torch.float32) if count else None


def _part(memory: Tensor | None, start: int, count: int) -> Tensor | None:
    """Return a part of the memory, None without numbers."""
    if memory is None or not count:
        return None
    return memory if count == len(memory) else memory[start : start + count]


def _flat(tables: Sequence[Tensor]) -> Tensor:
    """Return the numbers of all tables, one after another."""
    if len(tables) == 1:
        return tables[0].contiguous()
    return torch.cat([t.reshape(-1) for t in tables])


def _unit(x: Tensor) -> Tensor:
    """Return ``[B, H, R, D]``, copied where its strides are not those of a kernel.

    Its last stride is 1, and offsets in a head are int32: a projection whose tokens come first has
    strides of B * H * D numbers.
    """
    plain = x.stride(3) == 1 or x.shape[3] == 1
    return x if plain and span(x) < OFFSETS else x.contiguous()
