"""Gather and scatter on whole grids, by products with one-hot matrices instead of addresses.

Owned tokens come in units of 16 patches of one grid column, streamed ones in runs of 16 patches of
one grid row, see strips.py. The bucket of a pair is ``a * SIDE + c``: its row part a is the same
for a token and a run, its column part c for a unit and a token. So a token and a run
read SIDE neighbouring numbers, and a one-hot matrix, the same for all runs of the same columns,
selects among them.

Shapes: R owned and C streamed tokens of a tile, U = R / 16 units, K = C / 16 * SIDE.
"""

import torch
import triton
import triton.language as tl

from ..call import mask_floor

FLOOR_16 = tl.constexpr(mask_floor(torch.float16))
FLOOR_B16 = tl.constexpr(mask_floor(torch.bfloat16))


@triton.jit
def span(part, parts, end, part_slots, slots, SIDE: tl.constexpr):
    """Return the first slot of a part of the streamed tokens, and one past its last."""
    first = 0
    if SIDE > 0:
        first = part * part_slots
        end = tl.where(part == parts - 1, slots, first + part_slots)
    return first, end


@triton.jit
def token(slot, order, SIDE: tl.constexpr):
    """Return tokens of slots; with strips, past the end where a slot is empty."""
    if SIDE > 0:
        slot = tl.load(order + slot)
    return slot


@triton.jit
def strip_onehot(units, own, part, step, C: tl.constexpr, SIDE: tl.constexpr, like):
    """Return the one-hot matrices ``[U, K, C]``, of the type of like: numbers of runs to tokens."""
    onehot = 0
    if SIDE > 0:
        count: tl.constexpr = own.shape[0] // 16
        lane = tl.arange(0, C)
        unit = tl.min(own) // 16 + tl.arange(0, count)
        c = tl.load(units + unit[:, None] * step + (part * 16 + lane % 16)[None, :]).to(tl.int32)
        wanted = (lane // 16 * SIDE)[None, :] + c
        row = tl.arange(0, C // 16 * SIDE)
        onehot = (row[None, :, None] == wanted[:, None, :]).to(like.dtype)
    return onehot


@triton.jit
def strip_runs(runs, own, start, step, C: tl.constexpr, SIDE: tl.constexpr):
    """Return the row parts a ``[R, C / 16]`` of owned slots and the runs from a slot on."""
    a = 0
    if SIDE > 0:
        run = start // 16 + tl.arange(0, C // 16)
        a = tl.load(runs + own[:, None] * step + run[None, :]).to(tl.int32)
    return a


@triton.jit
def strip_gather(tile, rows, at, onehot, runs, SIDE: tl.constexpr):
    """Return ``tile[r, c] + rows[at[r] + a * SIDE + c]``."""
    R: tl.constexpr = tile.shape[0]
    C: tl.constexpr = tile.shape[1]
    units: tl.constexpr = R // 16
    K: tl.constexpr = C // 16 * SIDE
    place = (at[:, None] + runs * SIDE)[:, :, None] + tl.arange(0, SIDE)[None, None, :]
    place = tl.reshape(place, [R, K])
    place = tl.max_contiguous(tl.multiple_of(place, [1, SIDE]), [1, SIDE])
    # -inf times zero is NaN; the floor of masks hides a pair as well.
    lowest: tl.constexpr = FLOOR_16 if onehot.dtype == tl.float16 else FLOOR_B16
    numbers = tl.load(rows + place).to(tl.float32)
    numbers = tl.maximum(numbers, lowest, propagate_nan=tl.PropagateNan.ALL).to(onehot.dtype)
    numbers = tl.reshape(numbers, [units, 16, K])
    tile = tl.reshape(tile, [units, 16, C])
    return tl.reshape(tl.dot(numbers, onehot, tile), [R, C])


@triton.jit
def strip_scatter(
    rows, tile, token, length, onehot, runs, W: tl.constexpr, SIDE: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
):  # fmt: skip
    """``rows[token[r], a * SIDE + c] += tile[r, c]``; rows ``[R, W]`` are float32, of a program."""
    R: tl.constexpr = tile.shape[0]
    C: tl.constexpr = tile.shape[1]
    units: tl.constexpr = R // 16
    parts = tl.reshape(tile.to(onehot.dtype), [units, 16, C])
    sums = tl.dot(parts, tl.permute(onehot, (0, 2, 1)))
    sums = tl.reshape(sums, [R, C // 16, SIDE])
    inside = (token < length)[:, None]
    side = tl.arange(0, SIDE)
    if DETERMINISTIC:
        # One address per token and step, hence one order of additions.
        run = tl.arange(0, C // 16)
        for n in range(C // 16):
            one = tl.sum(tl.where((run == n)[None, :, None], sums, 0.0), 1)
            a = tl.sum(tl.where((run == n)[None, :], runs, 0), 1)
            place = (token * W + a * SIDE)[:, None] + side[None, :]
            tl.atomic_add(rows + place, one, mask=inside, sem="relaxed")
    else:
        place = (token[:, None] * W + runs * SIDE)[:, :, None] + side[None, None, :]
        tl.atomic_add(rows + place, sums, mask=inside[:, :, None], sem="relaxed")
