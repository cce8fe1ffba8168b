"""Attention with rows of numbers per token and bucket: forward, bucket mass, two backward passes.

Every kernel but the first recomputes the probabilities from q, k, the rows, the maps of ids and
the saved logarithms; nothing of size ``[B, H, L, S]`` reaches memory.

Shapes: q ``[B, H, L, D]``, k ``[B, G, S, D]``, v ``[B, G, S, E]``, out ``[B, H, L, E]``, by
strides; rows ``[H, B, L, W]`` (SHARED: ``[H | 1, W]`` for all queries), columns ``[H, B, S, W]``,
stats ``[2, H, B, L]``, delta ``[H, B, L]``;
ids ``[MAPS, B | 1, L', S']``, transposed in the column pass.
"""

import triton
import triton.language as tl

from .strip_tiles import span, strip_onehot, strip_runs, token
from .tiles import (
    LOG2E,
    add_gathered,
    add_own,
    drop,
    exponential,
    load_rows,
    masked,
    pair_logits,
    scatter_own,
    store_rows,
)  # fmt: skip

# Triton would compile a variant of a kernel for some values of these, without a use for it.
PLAIN = ["B", "H", "GROUP", "L", "S", "owned", "parts", "part_slots", "slots"]


@triton.jit
def program(length, H, BLOCK: tl.constexpr):
    """Return the slots of this program, and its batch times heads, batch and head."""
    tiles = tl.cdiv(length, BLOCK)
    tile = tl.program_id(0) % tiles
    bh = tl.program_id(0) // tiles
    return tile * BLOCK + tl.arange(0, BLOCK), bh, (bh // H).to(tl.int64), (bh % H).to(tl.int64)


@triton.jit
def load_stats(stats, i, B, H, L):
    """Return the largest logits of queries i, and logarithms of their sums (inf past the end)."""
    shift = tl.load(stats + i, mask=i < L, other=0.0)
    return shift, tl.load(stats + H.to(tl.int64) * B * L + i, mask=i < L, other=float("inf"))


@triton.jit
def last_key(i, L, S, CAUSAL: tl.constexpr):
    """Return one past the last key that queries i see."""
    end = S
    if CAUSAL:
        end = tl.minimum(S, tl.maximum(tl.max(i) + 1 + S - L, 0))
    return end


@triton.jit
def key_tile(
    start, o, i, queries, k, k_sl, rows, rows_at, ROWS: tl.constexpr, columns,
    COLUMNS: tl.constexpr, ids, ids_sm, ids_so, mask, mask_sl, mask_ss,
    others, runs, runs_so, onehot, L, S, D: tl.constexpr, D_BLOCK: tl.constexpr,
    MAPS: tl.constexpr, N: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    SIDE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Return BN keys of the tile: slots, tokens, strip runs, rows of k, and the logits."""
    s = start + tl.arange(0, BN)
    j = token(s, others, SIDE)
    run = strip_runs(runs, o, start, runs_so, BN, SIDE)
    columns_at = tl.minimum(j, S - 1) * (MAPS * N)
    keys = load_rows(k, j, k_sl, S, D, D_BLOCK)
    logits = pair_logits(
        queries, keys, rows, rows_at, ROWS, columns, columns_at, COLUMNS,
        ids, o, s, ids_sm, ids_so, MAPS, N, onehot, run, SIDE, TURNED=False,
    )  # fmt: skip
    logits = masked(logits, i[:, None], j[None, :], mask, mask_sl, mask_ss, L, S, MASK, CAUSAL)
    return s, j, run, keys, logits


@triton.jit(do_not_specialize=PLAIN)
def forward(
    q, k, v, out, stats, ids, rows, columns, mask, seed, order, others, runs, units,
    q_sb, q_sh, q_sl, k_sb, k_sh, k_sl, v_sb, v_sh, v_sl, out_sb, out_sh, out_sl,
    ids_sm, ids_sb, ids_so, rows_sh, mask_sb, mask_sh, mask_sl, mask_ss,
    B, H, GROUP, L, S, scale, dropout, factor,
    owned, runs_so, units_so, parts, part_slots, slots,
    D: tl.constexpr, E: tl.constexpr, D_BLOCK: tl.constexpr, E_BLOCK: tl.constexpr,
    MAPS: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, SHARED: tl.constexpr,
    COLUMNS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISE: tl.constexpr,
    SIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write out, and of each row the largest logit and the logarithm of its sum to base 2."""
    o, bh, b, h = program(owned, H, BM)
    i = token(o, order, SIDE)
    k += b * k_sb + h // GROUP * k_sh
    v += b * v_sb + h // GROUP * v_sh
    ids += b * ids_sb
    rows += h * rows_sh if SHARED else (h * B + b) * L * (MAPS * N)
    columns += (h * B + b) * S * (MAPS * N)
    mask += b * mask_sb + h * mask_sh
    rows_at = tl.minimum(i, L - 1) * (0 if SHARED else MAPS * N)

    queries = load_rows(q + b * q_sb + h * q_sh, i, q_sl, L, D, D_BLOCK)
    queries = (queries * scale).to(queries.dtype)
    best = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, E_BLOCK], tl.float32)
    for part in range(parts if SIDE > 0 else 1):
        onehot = strip_onehot(units, o, part, units_so, BN, SIDE, queries)
        first, end = span(part, parts, last_key(i, L, S, CAUSAL), part_slots, slots, SIDE)
        for start in range(first, end, BN):
            s, j, run, keys, logits = key_tile(
                start, o, i, queries, k, k_sl, rows, rows_at, ROWS, columns, COLUMNS,
                ids, ids_sm, ids_so, mask, mask_sl, mask_ss, others, runs, runs_so, onehot, L, S,
                D, D_BLOCK, MAPS, N, MASK, CAUSAL, SIDE, BN,
            )  # fmt: skip
            higher = tl.maximum(best, tl.max(logits, 1))
            # A row that saw nothing yet has no best: any finite number keeps its sums at zero.
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            shrink = tl.exp2((best - shift) * LOG2E)
            p = exponential(logits, shift[:, None], 0.0, PRECISE)
            total = total * shrink + tl.sum(p, 1)
            if DROPOUT:
                p = drop(p, seed, bh, i[:, None], j[None, :], S, dropout, factor)
            values = load_rows(v, j, v_sl, S, E, E_BLOCK)
            acc = acc * shrink[:, None]
            acc = tl.dot(p.to(values.dtype), values, acc, input_precision="ieee")
            best = higher
    seen = total > 0.0
    total = tl.where(seen, total, 1.0)
    store_rows(out + b * out_sb + h * out_sh, acc / total[:, None], i, out_sl, L, E, E_BLOCK)
    # A row that sees nothing gets zeros: exp(-inf - 0), every probability of it, is zero.
    stats += (h * B + b) * L + i
    tl.store(stats, tl.where(seen, best, 0.0), mask=i < L)
    tl.store(stats + H.to(tl.int64) * B * L, tl.log2(total), mask=i < L)


@triton.jit(do_not_specialize=PLAIN)
def mass(
    q, k, stats, sums, ids, rows, columns, mask, seed, order, others, runs, units,
    q_sb, q_sh, q_sl, k_sb, k_sh, k_sl,
    ids_sm, ids_sb, ids_so, rows_sh, mask_sb, mask_sh, mask_sl, mask_ss,
    B, H, GROUP, L, S, scale, dropout, factor,
    owned, runs_so, units_so, parts, part_slots, slots,
    D: tl.constexpr, E: tl.constexpr, D_BLOCK: tl.constexpr, E_BLOCK: tl.constexpr,
    MAPS: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, SHARED: tl.constexpr,
    COLUMNS: tl.constexpr, MASS: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, DETERMINISTIC: tl.constexpr,
    PRECISE: tl.constexpr, SIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """sums ``[H, B, L, W]`` += the probability in each bucket of each query."""
    o, bh, b, h = program(owned, H, BM)
    i = token(o, order, SIDE)
    k += b * k_sb + h // GROUP * k_sh
    ids += b * ids_sb
    rows += h * rows_sh if SHARED else (h * B + b) * L * (MAPS * N)
    columns += (h * B + b) * S * (MAPS * N)
    mask += b * mask_sb + h * mask_sh
    sums += (h * B + b) * L * (MAPS * N)
    rows_at = tl.minimum(i, L - 1) * (0 if SHARED else MAPS * N)

    queries = load_rows(q + b * q_sb + h * q_sh, i, q_sl, L, D, D_BLOCK)
    queries = (queries * scale).to(queries.dtype)
    shift, log_total = load_stats(stats + (h * B + b) * L, i, B, H, L)
    for part in range(parts if SIDE > 0 else 1):
        onehot = strip_onehot(units, o, part, units_so, BN, SIDE, queries)
        first, end = span(part, parts, last_key(i, L, S, CAUSAL), part_slots, slots, SIDE)
        for start in range(first, end, BN):
            s, j, run, keys, logits = key_tile(
                start, o, i, queries, k, k_sl, rows, rows_at, ROWS, columns, COLUMNS,
                ids, ids_sm, ids_so, mask, mask_sl, mask_ss, others, runs, runs_so, onehot, L, S,
                D, D_BLOCK, MAPS, N, MASK, CAUSAL, SIDE, BN,
            )  # fmt: skip
            p = exponential(logits, shift[:, None], log_total[:, None], PRECISE)
            if DROPOUT:
                p = drop(p, seed, bh, i[:, None], j[None, :], S, dropout, factor)
            scatter_own(
                sums, p, MASS, ids, o, i, L, s, ids_sm, ids_so, MAPS, N, DETERMINISTIC,
                onehot, run, SIDE,
            )  # fmt: skip


@triton.jit(do_not_specialize=PLAIN)
def row_pass(
    q, k, v, out, grad, stats, delta, grad_mass, grad_q, grad_rows,
    ids, rows, columns, mask, seed, order, others, runs, units,
    q_sb, q_sh, q_sl, k_sb, k_sh, k_sl, v_sb, v_sh, v_sl, out_sb, out_sh, out_sl,
    grad_sb, grad_sh, grad_sl, grad_q_sb, grad_q_sh, grad_q_sl,
    ids_sm, ids_sb, ids_so, rows_sh, mask_sb, mask_sh, mask_sl, mask_ss,
    B, H, GROUP, L, S, scale, dropout, factor,
    owned, runs_so, units_so, parts, part_slots, slots,
    D: tl.constexpr, E: tl.constexpr, D_BLOCK: tl.constexpr, E_BLOCK: tl.constexpr,
    MAPS: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, SHARED: tl.constexpr,
    COLUMNS: tl.constexpr, MASS: tl.constexpr, GRAD_ROWS: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    DETERMINISTIC: tl.constexpr, PRECISE: tl.constexpr,
    SIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write grad_q and delta = sum_j p dp; add to grad_rows ``[H, B, L, W]``."""
    o, bh, b, h = program(owned, H, BM)
    i = token(o, order, SIDE)
    own = (h * B + b) * L
    k += b * k_sb + h // GROUP * k_sh
    v += b * v_sb + h // GROUP * v_sh
    ids += b * ids_sb
    rows += h * rows_sh if SHARED else own * (MAPS * N)
    columns += (h * B + b) * S * (MAPS * N)
    mask += b * mask_sb + h * mask_sh
    grad_mass += own * (MAPS * N)
    grad_rows += own * (MAPS * N)
    rows_at = tl.minimum(i, L - 1) * (0 if SHARED else MAPS * N)

    queries = load_rows(q + b * q_sb + h * q_sh, i, q_sl, L, D, D_BLOCK)
    queries = (queries * scale).to(queries.dtype)
    grad_out = load_rows(grad + b * grad_sb + h * grad_sh, i, grad_sl, L, E, E_BLOCK)
    shift, log_total = load_stats(stats + own, i, B, H, L)
    outs = load_rows(out + b * out_sb + h * out_sh, i, out_sl, L, E, E_BLOCK)
    mean = tl.sum(outs.to(tl.float32) * grad_out.to(tl.float32), 1)
    tl.store(delta + own + i, mean, mask=i < L)
    mass_at = tl.minimum(i, L - 1) * (MAPS * N)
    acc = tl.zeros([BM, D_BLOCK], tl.float32)
    for part in range(parts if SIDE > 0 else 1):
        onehot = strip_onehot(units, o, part, units_so, BN, SIDE, queries)
        first, end = span(part, parts, last_key(i, L, S, CAUSAL), part_slots, slots, SIDE)
        for start in range(first, end, BN):
            s, j, run, keys, logits = key_tile(
                start, o, i, queries, k, k_sl, rows, rows_at, ROWS, columns, COLUMNS,
                ids, ids_sm, ids_so, mask, mask_sl, mask_ss, others, runs, runs_so, onehot, L, S,
                D, D_BLOCK, MAPS, N, MASK, CAUSAL, SIDE, BN,
            )  # fmt: skip
            p = exponential(logits, shift[:, None], log_total[:, None], PRECISE)
            values = load_rows(v, j, v_sl, S, E, E_BLOCK)
            dp = tl.zeros([BM, BN], tl.float32)
            dp = add_own(
                dp, grad_mass, mass_at, MASS, ids, o, s, ids_sm, ids_so, MAPS, N, onehot, run, SIDE
            )
            dp = tl.dot(grad_out, tl.trans(values), dp, input_precision="ieee")
            if DROPOUT:
                dp = drop(dp, seed, bh, i[:, None], j[None, :], S, dropout, factor)
            ds = p * (dp - mean[:, None])
            scatter_own(
                grad_rows, ds, GRAD_ROWS, ids, o, i, L, s, ids_sm, ids_so, MAPS, N, DETERMINISTIC,
                onehot, run, SIDE,
            )  # fmt: skip
            acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision="ieee")
    store_rows(grad_q + b * grad_q_sb + h * grad_q_sh, acc * scale, i, grad_q_sl, L, D, D_BLOCK)


@triton.jit(do_not_specialize=PLAIN)
def column_pass(
    q, k, v, grad, stats, delta, grad_mass, grad_k, grad_v, grad_columns,
    ids, rows, columns, mask, seed, order, others, runs, units,
    q_sb, q_sh, q_sl, k_sb, k_sh, k_sl, v_sb, v_sh, v_sl, grad_sb, grad_sh, grad_sl,
    grad_k_sb, grad_k_sh, grad_k_sl, grad_v_sb, grad_v_sh, grad_v_sl,
    ids_sm, ids_sb, ids_so, rows_sh, mask_sb, mask_sh, mask_sl, mask_ss,
    B, H, GROUP, L, S, scale, dropout, factor,
    owned, runs_so, units_so, parts, part_slots, slots,
    D: tl.constexpr, E: tl.constexpr, D_BLOCK: tl.constexpr, E_BLOCK: tl.constexpr,
    MAPS: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, SHARED: tl.constexpr,
    COLUMNS: tl.constexpr, MASS: tl.constexpr, GRAD_COLUMNS: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    DETERMINISTIC: tl.constexpr, PRECISE: tl.constexpr,
    SIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write grad_k and grad_v; add to grad_columns ``[H, B, S, W]``. Tiles are ``[BN, BM]``."""
    o, bkv, b, kv = program(owned, H // GROUP, BN)
    j = token(o, order, SIDE)
    ids += b * ids_sb
    keys = load_rows(k + b * k_sb + kv * k_sh, j, k_sl, S, D, D_BLOCK)
    values = load_rows(v + b * v_sb + kv * v_sh, j, v_sl, S, E, E_BLOCK)
    columns_at = tl.minimum(j, S - 1) * (MAPS * N)
    acc_k = tl.zeros([BN, D_BLOCK], tl.float32)
    acc_v = tl.zeros([BN, E_BLOCK], tl.float32)
    for member in range(GROUP):
        h = kv * GROUP + member
        bh = (b * H + h).to(tl.int32)
        stream = (h * B + b) * L
        h_rows = rows + (h * rows_sh if SHARED else stream * (MAPS * N))
        own_at = (h * B + b) * S * (MAPS * N)
        for part in range(parts if SIDE > 0 else 1):
            onehot = strip_onehot(units, o, part, units_so, BM, SIDE, keys)
            first, end = span(part, parts, L, part_slots, slots, SIDE)
            if CAUSAL:
                first = tl.maximum(tl.min(j) - (S - L), 0) // BM * BM
            for start in range(first, end, BM):
                s = start + tl.arange(0, BM)
                i = token(s, others, SIDE)
                run = strip_runs(runs, o, start, runs_so, BM, SIDE)
                rows_at = tl.minimum(i, L - 1) * (0 if SHARED else MAPS * N)
                mass_at = tl.minimum(i, L - 1) * (MAPS * N)
                queries = load_rows(q + b * q_sb + h * q_sh, i, q_sl, L, D, D_BLOCK)
                queries = (queries * scale).to(queries.dtype)
                logits = pair_logits(
                    keys, queries, columns + own_at, columns_at, COLUMNS, h_rows, rows_at, ROWS,
                    ids, o, s, ids_sm, ids_so, MAPS, N, onehot, run, SIDE, TURNED=True,
                )  # fmt: skip
                logits = masked(
                    logits, i[None, :], j[:, None], mask + b * mask_sb + h * mask_sh,
                    mask_sl, mask_ss, L, S, MASK, CAUSAL,
                )  # fmt: skip
                shift, log_total = load_stats(stats + stream, i, B, H, L)
                p = exponential(logits, shift[None, :], log_total[None, :], PRECISE)
                grad_out = load_rows(grad + b * grad_sb + h * grad_sh, i, grad_sl, L, E, E_BLOCK)
                given = p
                if DROPOUT:
                    given = drop(p, seed, bh, i[None, :], j[:, None], S, dropout, factor)
                acc_v = tl.dot(given.to(grad_out.dtype), grad_out, acc_v, input_precision="ieee")
                dp = tl.zeros([BN, BM], tl.float32)
                dp = add_gathered(
                    dp, grad_mass + stream * (MAPS * N), mass_at[None, :], MASS,
                    ids, o, s, ids_sm, ids_so, MAPS, N,
                )  # fmt: skip
                dp = tl.dot(values, tl.trans(grad_out), dp, input_precision="ieee")
                if DROPOUT:
                    dp = drop(dp, seed, bh, i[None, :], j[:, None], S, dropout, factor)
                mean = tl.load(delta + stream + i, mask=i < L, other=0.0)
                ds = p * (dp - mean[None, :])
                scatter_own(
                    grad_columns + own_at, ds, GRAD_COLUMNS, ids, o, j, S, s, ids_sm, ids_so,
                    MAPS, N, DETERMINISTIC, onehot, run, SIDE,
                )  # fmt: skip
                acc_k = tl.dot(ds.to(queries.dtype), queries, acc_k, input_precision="ieee")
    store_rows(grad_k + b * grad_k_sb + kv * grad_k_sh, acc_k, j, grad_k_sl, S, D, D_BLOCK)
    store_rows(grad_v + b * grad_v_sb + kv * grad_v_sh, acc_v, j, grad_v_sl, S, E, E_BLOCK)
