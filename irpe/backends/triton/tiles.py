"""Parts of kernels that compute on a tile of pairs, in either orientation.

A tile holds the pairs of the tokens *owned* by a program (its rows) and of *streamed* tokens
(its columns). Forward and row pass own queries; the column pass owns keys. Tables come as rows
of numbers, one number per bucket: the rows of an owned token are private to its program.

Shapes: R owned and C streamed tokens, MAPS maps of bucket ids, N padded buckets of one map,
W = MAPS * N numbers in a row. Sets of maps (OWN, STREAM, USED) are bit masks.
"""

import torch
import triton
import triton.language as tl

from ..call import mask_floor
from .strip_tiles import strip_gather, strip_scatter

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
def load_ids(ids, m, own, stream, ids_sm, ids_so):
    """Return bucket ids ``[R, C]`` of map m; maps are padded to whole tiles."""
    return tl.load(ids + m * ids_sm + own[:, None] * ids_so + stream[None, :]).to(tl.int32)


@triton.jit
def add_gathered(
    tile, rows, at, USED: tl.constexpr, ids, own, stream, ids_sm, ids_so,
    MAPS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Return ``tile[r, c]`` + the sum over maps m of ``rows[at + m * N + id[r, c]]``, float32."""
    for m in tl.static_range(MAPS):
        if (USED >> m) & 1:
            index = load_ids(ids, m, own, stream, ids_sm, ids_so)
            tile += tl.load(rows + (at + (m * N) + index)).to(tl.float32)
    return tile


@triton.jit
def scatter(
    rows, tile, USED: tl.constexpr, ids, own, length, stream, ids_sm, ids_so,
    MAPS: tl.constexpr, N: tl.constexpr, DETERMINISTIC: tl.constexpr,
):  # fmt: skip
    """``rows[r, m * N + id[r, c]] += tile[r, c]``; rows are float32 and private to the program.

    The tile is zero for streamed tokens past the end; owned ones past it (length) are skipped.
    """
    inside = own < length
    for m in tl.static_range(MAPS):
        if (USED >> m) & 1:
            target = own * (MAPS * N) + m * N
            index = load_ids(ids, m, own, stream, ids_sm, ids_so)
            if DETERMINISTIC:
                # One address per token and step, hence one order of additions.
                for n in range(N):
                    part = tl.sum(tl.where(index == n, tile, 0.0), 1)
                    tl.atomic_add(rows + (target + n), part, mask=inside, sem="relaxed")
            else:
                target = target[:, None] + index
                tl.atomic_add(rows + target, tile, mask=inside[:, None], sem="relaxed")


@triton.jit
def add_own(
    tile, rows, at, USED: tl.constexpr, ids, own, stream, ids_sm, ids_so,
    MAPS: tl.constexpr, N: tl.constexpr, onehot, runs, SIDE: tl.constexpr,
):  # fmt: skip
    """``add_gathered`` from rows of the owned tokens, ``at [R]``; with strips by a product."""
    if SIDE == 0:
        tile = add_gathered(
            tile, rows, at[:, None], USED, ids, own, stream, ids_sm, ids_so, MAPS, N
        )
    elif USED > 0:
        tile = strip_gather(tile, rows, at, onehot, runs, SIDE)
    return tile


@triton.jit
def scatter_own(
    rows, tile, USED: tl.constexpr, ids, own, token, length, stream, ids_sm, ids_so,
    MAPS: tl.constexpr, N: tl.constexpr, DETERMINISTIC: tl.constexpr,
    onehot, runs, SIDE: tl.constexpr,
):  # fmt: skip
    """``scatter`` into rows of the owned tokens; with strips by a product."""
    if SIDE == 0:
        scatter(rows, tile, USED, ids, own, length, stream, ids_sm, ids_so, MAPS, N, DETERMINISTIC)
    elif USED > 0:
        strip_scatter(rows, tile, token, length, onehot, runs, N, SIDE, DETERMINISTIC)


@triton.jit
def pair_logits(
    owned, streamed, own_rows, own_at, OWN: tl.constexpr,
    stream_rows, stream_at, STREAM: tl.constexpr,
    ids, own, stream, ids_sm, ids_so,
    MAPS: tl.constexpr, N: tl.constexpr, onehot, runs,
    SIDE: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Return logits ``[R, C]`` without masks.

    The gathered numbers enter the product as its accumulator: that keeps them in the layout of
    the matrix unit, where an addition afterwards would make the compiler compute the softmax twice.
    Those of queries come first, whether owned or streamed (TURNED): with another order of
    additions a large logit would round to another number than the one that made the sums.
    """
    start = tl.zeros([owned.shape[0], streamed.shape[0]], tl.float32)
    if not TURNED:
        start = add_own(
            start, own_rows, own_at, OWN, ids, own, stream, ids_sm, ids_so, MAPS, N,
            onehot, runs, SIDE,
        )  # fmt: skip
    start = add_gathered(
        start, stream_rows, stream_at[None, :], STREAM, ids, own, stream, ids_sm, ids_so, MAPS, N
    )
    if TURNED:
        start = add_own(
            start, own_rows, own_at, OWN, ids, own, stream, ids_sm, ids_so, MAPS, N,
            onehot, runs, SIDE,
        )  # fmt: skip
    return tl.dot(owned, tl.trans(streamed), start, input_precision="ieee")


@triton.jit
def masked(logits, i, j, mask, mask_sl, mask_ss, L, S, MASK: tl.constexpr, CAUSAL: tl.constexpr):
    """Return logits, -inf where a pair is hidden; queries i and keys j broadcast to the tile."""
    seen = j < S
    if CAUSAL:
        seen = seen & (j <= i + (S - L))
    logits = tl.where(seen, logits, float("-inf"))
    inside = (i < L) & (j < S)
    if MASK == "bool":
        open = tl.load(mask + i * mask_sl + j * mask_ss, mask=inside, other=0)
        logits = tl.where(open != 0, logits, float("-inf"))
    if MASK == "float":
        added = tl.load(mask + i * mask_sl + j * mask_ss, mask=inside, other=0.0).to(tl.float32)
        logits += tl.where(added == float("-inf"), added, tl.maximum(added, MASK_FLOOR))
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
def drop(tile, seed, bh, i, j, S, p, factor):
    """Drop pairs, with the same random number for a pair in every pass; factor is 1 / (1 - p)."""
    return tl.where(tl.rand(tl.load(seed) + bh, i * S + j) >= p, tile * factor, 0.0)
