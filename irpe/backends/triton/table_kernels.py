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
    SHARE: tl.constexpr, W: tl.constexpr, STEP: tl.constexpr,
    BB: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Write the gradients of tables: sums over programs, places in a share and heads.

    Args:
        targets: int32 ``[7, count]``: of each bucket of each table the address in flat of its first
            number, the step to the next one, how many there are, where its shares are (0: in
            row_shares, 1: a second kind there, 2: column_shares, 3: bias_shares), its head, the
            number of heads, and its places.
        members: int32 ``[places, count]``: its places in a share.
    """
    r = tl.program_id(0) * BB + tl.arange(0, BB)
    target, known = targets + r, r < count
    at = tl.load(target, mask=known, other=0)
    step = tl.load(target + count, mask=known, other=0)
    wide = tl.load(target + 2 * count, mask=known, other=0)
    where = tl.load(target + 3 * count, mask=known, other=0)[:, None]
    head = tl.load(target + 4 * count, mask=known, other=0)[:, None]
    heads = tl.load(target + 5 * count, mask=known, other=1)[:, None]
    places = tl.load(target + 6 * count, mask=known, other=0)[:, None]
    own = heads * tl.where(where == 2, column_programs, row_programs)
    rows = tl.where(where == 2, W, SHARE)
    second = (where == 1).to(tl.int64) * row_programs * H * SHARE
    d = tl.arange(0, STEP)
    total = tl.zeros([BB, STEP], tl.float32)
    for first in range(0, tl.max(places * own), BP):
        x = first + tl.arange(0, BP)[None, :]
        some = x < places * own
        w = tl.load(members + x // tl.maximum(own, 1) * count + r[:, None], mask=some, other=0)
        one = x % tl.maximum(own, 1)
        share = (one // heads * H + head + one % heads).to(tl.int64) * rows + w
        inside = (some & (where < 3))[:, :, None] & (d[None, :] < wide[:, None])[:, None, :]
        apart = (where == 2)[:, :, None]
        place = ((second + share) * STEP)[:, :, None] + d[None, None, :]
        found = tl.load(row_shares + place, mask=inside & (apart == 0), other=0.0).to(tl.float32)
        found += tl.load(column_shares + place, mask=inside & apart, other=0.0).to(tl.float32)
        total += tl.sum(found, 1)
        biases = tl.load(bias_shares + share, mask=some & (where == 3), other=0.0).to(tl.float32)
        total += tl.where(d[None, :] == 0, tl.sum(biases, 1)[:, None], 0.0)
    place = flat + at[:, None] + d[None, :] * step[:, None]
    tl.store(place, total.to(flat.dtype.element_ty), mask=d[None, :] < wide[:, None])
