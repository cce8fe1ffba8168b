"""Kernels that convert tables to rows of numbers, and sum the gradients of tables.

Both follow lists of addresses from tables.py. ``flat`` holds all tables of a call one after
another, as they are kept.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count", "plain", "floor"])
def prepare(
    flat, sources, tables, bias, count, plain, floor,
    SOURCES: tl.constexpr, STEP: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Write tables ``[plain, STEP]``, and bias ``[count - plain]``: sums of rows of ``flat``.

    Args:
        sources: int32 ``[SOURCES, 3, count]``: of each row the address of its first number (-1:
            none), the step to the next one, and how many there are.
        floor: lowest bias.
    """
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    d = tl.arange(0, STEP)[None, :]
    total = tl.zeros([BR, STEP], tl.float32)
    for s in tl.static_range(SOURCES):
        place = sources + s * 3 * count + r
        at = tl.load(place, mask=r < count, other=-1)[:, None]
        step = tl.load(place + count, mask=r < count, other=0)[:, None]
        wide = tl.load(place + 2 * count, mask=r < count, other=0)[:, None]
        inside = (at >= 0) & (d < wide)
        total += tl.load(flat + at + d * step, mask=inside, other=0.0).to(tl.float32)
    made = total.to(tables.dtype.element_ty)
    tl.store(tables + r[:, None] * STEP + d, made, mask=(r < plain)[:, None])
    lowest = tl.maximum(total, floor, propagate_nan=tl.PropagateNan.ALL)
    alone = ((r >= plain) & (r < count))[:, None] & (d == 0)
    tl.store(bias + (r - plain)[:, None] + d, lowest.to(bias.dtype.element_ty), mask=alone)


@triton.jit(do_not_specialize=["count", "row_programs", "column_programs", "H"])
def reduce(
    row_shares, column_shares, bias_shares, flat, targets, members, count,
    row_programs, column_programs, H,
    W: tl.constexpr, STEP: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Write the gradients of tables: sums over programs, places in a row and heads.

    Args:
        targets: int32 ``[7, count]``: of each bucket of each table the address in flat of its first
            number, the step to the next one, how many there are, where its shares are (0: in
            row_shares, 1: a second kind there, 2: column_shares, 3: bias_shares), its head, the
            number of heads, and its places.
        members: int32 ``[places, count]``: its places in a row of W.
    """
    r = tl.program_id(0)
    at, step = tl.load(targets + r), tl.load(targets + count + r)
    wide, where = tl.load(targets + 2 * count + r), tl.load(targets + 3 * count + r)
    head, heads = tl.load(targets + 4 * count + r), tl.load(targets + 5 * count + r)
    places = tl.load(targets + 6 * count + r)
    programs = tl.where(where == 2, column_programs, row_programs)
    second = (where == 1).to(tl.int64) * row_programs * H * W * STEP
    d = tl.arange(0, STEP)[None, :]
    inside = d < wide
    total = tl.zeros([STEP], tl.float32)
    for m in range(places):
        w = tl.load(members + m * count + r)
        for first in range(0, programs * heads, BP):
            one = first + tl.arange(0, BP)
            share = ((one // heads * H + head + one % heads).to(tl.int64) * W + w)[:, None]
            some = (one < programs * heads)[:, None] & inside
            if where == 2:
                found = tl.load(column_shares + share * STEP + d, mask=some, other=0.0).to(
                    tl.float32
                )
            elif where == 3:
                found = tl.load(bias_shares + share + d, mask=some, other=0.0).to(tl.float32)
            else:
                found = tl.load(row_shares + second + share * STEP + d, mask=some, other=0.0).to(
                    tl.float32
                )
            total += tl.sum(found, 0)
    own = flat + at + tl.arange(0, STEP) * step
    tl.store(own, total.to(flat.dtype.element_ty), mask=tl.arange(0, STEP) < wide)
