"""Parts of kernels that compute on a tile of pairs, [queries, keys] in every kernel.

Tables come as rows of numbers, one number per bucket: rows of queries hold ``q @ table`` and
biases, rows of keys ``k @ table``. On whole grids strip_tiles.py gathers and scatters; elsewhere
every pair has its address, from maps of bucket ids.

Shapes: BM queries and BN keys, MAPS maps of bucket ids, N padded buckets of one map, W = MAPS * N
numbers in a row. Sets of maps (USED) are bit masks.
"""

import torch
import triton
import triton.language as tl

from ..call import mask_floor
from .strip_tiles import (
    column_parts,
    row_parts,
    run_onehot,
    strip_gather,
    strip_scatter,
    unit_onehot,
)

LOG2E = tl.constexpr(1.4426950408889634)  # GPUs compute powers of 2
MASK_FLOOR = tl.constexpr(mask_floor(torch.float32))  # logits are float32


@triton.jit
def load_rows(base, index, step, length, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Return rows ``[R, BLOCK]`` of a matrix with unit last stride; zero past its edges."""
    column = tl.arange(0, BLOCK)
    inside = index[:, None] < length
    if WIDTH != BLOCK:
        inside &= column[None, :] < WIDTH
    return tl.load(base + index[:, None] * step + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(base, values, index, step, length, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store rows: the reverse of ``load_rows``."""
    column = tl.arange(0, BLOCK)
    inside = index[:, None] < length
    if WIDTH != BLOCK:
        inside &= column[None, :] < WIDTH
    values = values.to(base.dtype.element_ty)
    tl.store(base + index[:, None] * step + column[None, :], values, mask=inside)


@triton.jit
def block(base, row, first, STEP: tl.constexpr, WIDTH: tl.constexpr):
    """Return addresses of rows, and WIDTH numbers of each from the first on."""
    return base + row[:, None] * STEP + (first + tl.arange(0, WIDTH))[None, :]


@triton.jit
def fill_rows(
    rows, x, i, length, table, bias, floor, factor, BIAS: tl.constexpr,
    W: tl.constexpr, PIECE: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write rows i of numbers: x ``[R, BLOCK]`` @ table ``[W, STEP]`` transposed, plus biases."""
    for first in range(0, W, PIECE):
        w = first + tl.arange(0, PIECE)
        own = tl.load(block(table, w, 0, STEP, BLOCK))
        made = tl.dot(x, tl.trans(own), input_precision="ieee") * factor
        if BIAS:
            made += tl.load(bias + w).to(tl.float32)[None, :]
        # In a product with a one-hot matrix -inf times zero is NaN; the floor of masks hides a
        # pair as well.
        made = tl.maximum(made, floor, propagate_nan=tl.PropagateNan.ALL)
        made = made.to(rows.dtype.element_ty)
        tl.store(block(rows, i, first, W, PIECE), made, mask=(i < length)[:, None])


@triton.jit
def clear(sums, R: tl.constexpr, W: tl.constexpr, PIECE: tl.constexpr):
    """Set a program's sums ``[R, W]`` to zero."""
    for first in range(0, W, PIECE):
        at = block(sums, tl.arange(0, R), first, W, PIECE)
        tl.store(at, tl.zeros([R, PIECE], tl.float32))


@triton.jit
def token(slot, order, SIDE: tl.constexpr):
    """Return tokens of slots; with strips, past the end where a slot is empty."""
    if SIDE > 0:
        slot = tl.load(order + slot)
    return slot


@triton.jit
def shown_keys(j, mask, mask_ss, S, MASK: tl.constexpr):
    """Return which keys exist, and are not hidden from all queries by a mask of keys."""
    shown = j < S
    if MASK == "keys":
        shown = tl.load(mask + j * mask_ss, mask=shown, other=0) != 0
    return shown


@triton.jit
def span(part, parts, end, part_slots, slots, SIDE: tl.constexpr):
    """Return the first slot of a part of the keys, and one past its last."""
    first = 0
    if SIDE > 0:
        first = part * part_slots
        end = tl.where(part == parts - 1, slots, first + part_slots)
    return first, end


@triton.jit
def last_key(i, L, S, CAUSAL: tl.constexpr):
    """Return one past the last key that queries i see."""
    end = S
    if CAUSAL:
        end = tl.minimum(S, tl.maximum(tl.max(i) + 1 + S - L, 0))
    return end


@triton.jit
def own_row(i, length):
    """Return the rows of tokens i; those of empty slots are a row of this tile, which exists."""
    return tl.where(i < length, i, tl.min(i))


@triton.jit
def query_strips(
    units, units_so, o_first, part, BM: tl.constexpr, BN: tl.constexpr, SIDE: tl.constexpr,
    COLUMNS: tl.constexpr, like,
):  # fmt: skip
    """Return one-hot matrices and column parts of queries and a part of the keys."""
    hot, across = 0, 0
    if SIDE > 0:
        unit = o_first // 16
        hot = unit_onehot(units, unit, BM // 16, part, units_so, SIDE, like)
        if COLUMNS > 0:
            across = column_parts(units, unit, part, BN, BM // 16, units_so)
    return hot, across


@triton.jit
def key_strips(
    runs, runs_so, o_first, start, BM: tl.constexpr, BN: tl.constexpr, SIDE: tl.constexpr,
    COLUMNS: tl.constexpr, like,
):  # fmt: skip
    """Return row parts and one-hot matrices of queries and of keys from a slot of a part on."""
    down, hot = 0, 0
    if SIDE > 0:
        down = row_parts(runs, o_first, start, BM, BN // 16, runs_so)
        if COLUMNS > 0:
            hot = run_onehot(runs, o_first, start, BN // 16, runs_so, SIDE, like)
    return down, hot


@triton.jit
def map_ids(ids, m, i, j, ids_sm, ids_so):
    """Return bucket ids ``[BM, BN]`` of map m; maps are padded to whole tiles."""
    return tl.load(ids + m * ids_sm + i[:, None] * ids_so + j[None, :]).to(tl.int32)


@triton.jit
def map_gather(
    tile, numbers, at, USED: tl.constexpr, ids, i, j, ids_sm, ids_so, MAPS: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """Return tile plus ``numbers[at + bucket]``, summed over maps; at broadcasts to the tile."""
    for m in tl.static_range(MAPS):
        if (USED >> m) & 1:
            index = map_ids(ids, m, i, j, ids_sm, ids_so)
            tile += tl.load(numbers + (at + (m * N) + index)).to(tl.float32)
    return tile


@triton.jit
def add_rows(
    tile, numbers, at, USED: tl.constexpr, ids, i, j, ids_sm, ids_so, down, hot,
    MAPS: tl.constexpr, N: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Return tile plus ``numbers[at[i] + bucket]``, summed over maps, from rows of queries."""
    if SIDE > 0:
        tile = strip_gather(tile, numbers, at, down, hot, SIDE)
    else:
        tile = map_gather(tile, numbers, at[:, None], USED, ids, i, j, ids_sm, ids_so, MAPS, N)
    return tile


@triton.jit
def add_columns(
    tile, numbers, at, USED: tl.constexpr, ids, i, j, ids_sm, ids_so, across, run_hot,
    MAPS: tl.constexpr, N: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """``add_rows`` from rows of keys, ``numbers[at[j] + bucket]``."""
    if SIDE > 0:
        tile = tl.trans(strip_gather(tl.trans(tile), numbers, at, across, run_hot, SIDE))
    else:
        tile = map_gather(tile, numbers, at[None, :], USED, ids, i, j, ids_sm, ids_so, MAPS, N)
    return tile


@triton.jit
def scatter(
    sums, tile, AXIS: tl.constexpr, USED: tl.constexpr, ids, i, j, ids_sm, ids_so, parts, hot,
    MAPS: tl.constexpr, N: tl.constexpr, SIDE: tl.constexpr, DETERMINISTIC: tl.constexpr,
):  # fmt: skip
    """Add a tile to a program's sums ``[BM, W]`` of queries (AXIS 0) or ``[BN, W]`` of keys (1).

    With strips the tile is ``[BN, BM]`` for sums of keys.
    """
    own = tl.arange(0, tile.shape[0] if SIDE > 0 else tile.shape[AXIS]) * (MAPS * N)
    if SIDE > 0:
        strip_scatter(sums, tile, own, parts, hot, SIDE, DETERMINISTIC)
    else:
        for m in tl.static_range(MAPS):
            if (USED >> m) & 1:
                index = map_ids(ids, m, i, j, ids_sm, ids_so)
                if DETERMINISTIC:
                    # One address per token and step, of one thread: one order of additions.
                    for n in range(N):
                        place = sums + (own + (m * N + n))
                        part = tl.sum(tl.where(index == n, tile, 0.0), 1 - AXIS)
                        tl.store(place, tl.load(place) + part)
                else:
                    target = tl.expand_dims(own, 1 - AXIS) + (m * N) + index
                    tl.atomic_add(sums + target, tile, sem="relaxed")


@triton.jit
def pair_logits(
    queries, keys, i, j, rows, rows_at, ROWS: tl.constexpr, columns, columns_at,
    COLUMNS: tl.constexpr, ids, ids_sm, ids_so, down, hot, across, run_hot,
    mask, mask_sl, mask_ss, L, S, MAPS: tl.constexpr, N: tl.constexpr, SIDE: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Return logits ``[BM, BN]``, -inf where a pair is hidden; with EDGE also past the last key.

    The mask and the gathered numbers enter the product as its accumulator: that keeps them in the
    layout of the matrix unit, where an addition afterwards would make the compiler compute the
    softmax two or three times. In float32, where no matrix unit is used, a mask of numbers is added
    afterwards: that rounds once. All kernels add in one order: a large logit rounds to the number
    that made the sums.
    """
    LATE: tl.constexpr = MASK == "float" and queries.dtype == tl.float32
    start = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    if MASK == "bool" or MASK == "float":
        inside = (i < L)[:, None] & (j < S)[None, :]
        added = tl.load(mask + i[:, None] * mask_sl + j[None, :] * mask_ss, mask=inside, other=0)
        if MASK == "bool":
            added = tl.where(added != 0, 0.0, float("-inf"))
        else:
            added = added.to(tl.float32)
            added = tl.where(added == float("-inf"), added, tl.maximum(added, MASK_FLOOR))
        if not LATE:
            start = added
    if COLUMNS > 0:  # first, since strips turn the tile
        start = add_columns(
            start, columns, columns_at, COLUMNS, ids, i, j, ids_sm, ids_so, across, run_hot,
            MAPS, N, SIDE,
        )  # fmt: skip
    if ROWS > 0:
        start = add_rows(
            start, rows, rows_at, ROWS, ids, i, j, ids_sm, ids_so, down, hot, MAPS, N, SIDE
        )
    logits = tl.dot(queries, tl.trans(keys), start, input_precision="ieee")
    if LATE:
        logits += added
    if EDGE:
        shown = shown_keys(j, mask, mask_ss, S, MASK)
        logits = tl.where(shown[None, :], logits, float("-inf"))
    if CAUSAL:
        logits = tl.where(j[None, :] <= i[:, None] + (S - L), logits, float("-inf"))
    return logits


@triton.jit
def exponential(logits, shift, log_total, PRECISE: tl.constexpr):
    """Return exp(logits - shift) / 2 ** log_total.

    PRECISE subtracts the shift first, so that large logits lose no digits.
    """
    if PRECISE:
        power = (logits - shift) * LOG2E - log_total
    else:
        power = logits * LOG2E - (shift * LOG2E + log_total)
    return tl.exp2(power)


@triton.jit
def load_stats(stats, i, B, H, L):
    """Return the largest logits of queries i, and logarithms of their sums (inf past the end)."""
    shift = tl.load(stats + i, mask=i < L, other=0.0)
    return shift, tl.load(stats + H.to(tl.int64) * B * L + i, mask=i < L, other=float("inf"))


@triton.jit
def drop(tile, seed, bh, i, j, S, p, factor):
    """Drop pairs, with the same random number for a pair in every pass; factor is 1 / (1 - p)."""
    # 7 rounds of Philox pass the tests of randomness (Salmon et al., 2011).
    keep = tl.rand(tl.load(seed) + bh, i[:, None] * S + j[None, :], n_rounds=7) >= p
    return tl.where(keep, tile * factor, 0.0)
