"""The gather ``y[b, h, i, j] = x[b, h, i, ids[i, j]]``; its adjoint as products, no atomics.

Ids come in G groups: one for all batches and heads, or one for each sample. The R = B * H / G rows
of a group share its ids, so a program reads ids once for BM of them.

Shapes: x and g by strides, ids ``[G, L, S]`` by strides, outputs contiguous. Offsets of rows and
products of strides are int64: a tensor may hold more than 2**31 numbers.
"""

import triton
import triton.language as tl


@triton.jit
def rows_of(block, R, H, BM: tl.constexpr):
    """The group of a block of rows; rows counted over all groups, batch, head, and existence."""
    blocks = tl.cdiv(R, BM)
    group = block // blocks
    row = (block % blocks) * BM + tl.arange(0, BM)
    place = group * R + row
    b, h = (place // H).to(tl.int64), (place % H).to(tl.int64)
    return group.to(tl.int64), place.to(tl.int64), b, h, row < R


@triton.jit(do_not_specialize=["R", "H", "S"])
def lookup(
    x, ids, y, x_sb, x_sh, x_sl, x_sn, ids_sb, ids_sl, ids_ss, pairs, R, H, S,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Writes y. A tile is BM rows by BN of the pairs = L * S pairs of a query and a key."""
    tiles = tl.cdiv(pairs, BN)
    start = (tl.program_id(0) % tiles).to(tl.int64) * BN
    group, place, b, h, exists = rows_of(tl.program_id(0) // tiles, R, H, BM)
    pair = start + tl.arange(0, BN)
    # One division of long numbers for the tile, short ones for its pairs.
    past = (start % S).to(tl.int32) + tl.arange(0, BN)
    i = start // S + past // S
    j = (past % S).to(tl.int64)
    inside = pair < pairs
    n = tl.load(ids + group * ids_sb + i * ids_sl + j * ids_ss, mask=inside, other=0)
    source = (b * x_sb + h * x_sh)[:, None] + (i * x_sl + n.to(tl.int64) * x_sn)[None, :]
    mask = exists[:, None] & inside[None, :]
    value = tl.load(x + source, mask=mask)
    tl.store(y + (place * pairs)[:, None] + pair[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["R", "H", "L", "S", "N"])
def lookup_backward(
    g, ids, out, g_sb, g_sh, g_sl, g_ss, ids_sb, ids_sl, ids_ss, R, H, L, S, N,
    BM: tl.constexpr, BN: tl.constexpr, BUCKETS: tl.constexpr, SEVERAL: tl.constexpr,
):  # fmt: skip
    """Writes out ``[..., i, n] = sum_j g[..., i, j] * [ids[i, j] == n]``, one query a program.

    A product of BM rows of g with the one-hot ids of the query, summed over BN keys at a time in
    float32. SEVERAL: N takes several blocks of BUCKETS; keys without an id in the block are passed.
    """
    blocks = tl.cdiv(N, BUCKETS)
    first = (tl.program_id(0) % blocks) * BUCKETS
    i = (tl.program_id(0) // blocks % L).to(tl.int64)
    group, place, b, h, exists = rows_of(tl.program_id(0) // blocks // L, R, H, BM)
    n = first + tl.arange(0, BUCKETS)
    ids += group * ids_sb + i * ids_sl
    g_rows = g + (b * g_sb + h * g_sh + i * g_sl)[:, None]
    sums = tl.zeros([BM, BUCKETS], tl.float32)
    for start in range(0, S, BN):
        j = start + tl.arange(0, BN)
        at = j.to(tl.int64)
        # Past the end an id may be any: g is zero there.
        bucket = tl.load(ids + at * ids_ss, mask=j < S, other=0).to(tl.int32)
        near = True
        if SEVERAL:
            near = (tl.max(bucket) >= first) & (tl.min(bucket) < first + BUCKETS)
        if near:
            mask = exists[:, None] & (j < S)[None, :]
            flow = tl.load(g_rows + (at * g_ss)[None, :], mask=mask, other=0.0)
            hot = (bucket[:, None] == n[None, :]).to(flow.dtype)
            sums = tl.dot(flow, hot, sums, input_precision="ieee")
    target = out + ((place * L + i) * N)[:, None] + n[None, :]
    mask = exists[:, None] & (n < N)[None, :]
    tl.store(target, sums.to(out.dtype.element_ty), mask=mask)
