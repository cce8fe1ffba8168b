"""Attention with rows of numbers per token and bucket: project, forward, two backward passes.

Every kernel recomputes the probabilities from q, k, the rows of numbers, the bucket ids and the
saved logarithms; nothing of size ``[B, H, L, S]`` reaches memory. A program of forward and of the
backward passes has one head and loops over batches and tiles. It adds up by bucket in scratch
memory of its own, and ends a tile with the products of these sums and the table. Its share of a
table's gradient is added up in memory of its own too; table_kernels.py sums the shares.

Shapes: q ``[B, H, L, D]``, k ``[B, G, S, D]``, v ``[B, G, S, E]``, out ``[B, H, L, E]``, by
strides; rows ``[H, B, L, W]`` (SHARED: ``[H, W]`` for all queries), columns ``[H, B, S, W]``,
grad_mass ``[H, B, L, W]``, stats ``[2, H, B, L]``, delta ``[H, B, L]``; tables
``[kinds, H, W, STEP]`` of query, key and value terms; ids ``[MAPS, B | 1, L', S']``; scratch
``[programs, BM | BN, W]``, shares ``[kinds, programs, SHARE, STEP]`` of the row pass and
``[programs, W, STEP]`` of the column pass.

``tl.debug_barrier`` orders accesses to memory that only one program touches. Without HOIST nothing
is computed before a loop over pairs that could be, which takes fewer registers.
"""

import triton
import triton.language as tl

from .strip_tiles import share_rows
from .tiles import (
    LOG2E,
    add_rows,
    block,
    clear,
    drop,
    exponential,
    fill_rows,
    key_strips,
    last_key,
    load_rows,
    load_stats,
    own_row,
    pair_logits,
    query_strips,
    scatter,
    shown_keys,
    span,
    store_rows,
    token,
)  # fmt: skip

# Triton would compile a variant of a kernel for some values of these, without a use for it.
PLAIN = [
    "B", "H", "GROUP", "L", "S", "owned", "tiles", "parts", "part_slots", "slots",
    "floor", "scale", "dropout", "factor",
]  # fmt: skip


@triton.jit(do_not_specialize=PLAIN)
def project(
    k, columns, tables, k_sb, k_sh, k_sl, B, H, GROUP, S, scale, floor,
    D: tl.constexpr, D_BLOCK: tl.constexpr, STEP: tl.constexpr, W: tl.constexpr,
    KEY: tl.constexpr, PIECE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write columns, ``scale * k @ table``."""
    tiles = tl.cdiv(S, BN)
    j = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    bh = tl.program_id(0) // tiles
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    keys = load_rows(k + b * k_sb + h // GROUP * k_sh, j, k_sl, S, D, D_BLOCK)
    fill_rows(
        columns + (h * B + b) * S * W, keys, j, S, tables + (KEY * H + h) * W * STEP, tables,
        floor, scale, False, W, PIECE, STEP, D_BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=PLAIN)
def forward(
    q, k, v, out, stats, ids, rows, columns, tables, bias, scratch, mask, seed,
    order, others, runs, units,
    q_sb, q_sh, q_sl, k_sb, k_sh, k_sl, v_sb, v_sh, v_sl, out_sb, out_sh, out_sl,
    ids_sm, ids_sb, ids_so, mask_sb, mask_sh, mask_sl, mask_ss,
    B, H, GROUP, L, S, scale, dropout, factor, floor,
    tiles, runs_so, units_so, parts, part_slots, slots,
    D: tl.constexpr, E: tl.constexpr, D_BLOCK: tl.constexpr, E_BLOCK: tl.constexpr,
    STEP: tl.constexpr, W: tl.constexpr, MAPS: tl.constexpr, N: tl.constexpr,
    ROWS: tl.constexpr, SHARED: tl.constexpr, BIAS: tl.constexpr, COLUMNS: tl.constexpr,
    MASS: tl.constexpr, VALUE: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr, DETERMINISTIC: tl.constexpr, PRECISE: tl.constexpr,
    SIDE: tl.constexpr, PIECE: tl.constexpr, HOIST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write out, rows, and of each row the largest logit and the logarithm of its sum to base 2."""
    h = (tl.program_id(0) % H).to(tl.int64)
    scratch += tl.program_id(0).to(tl.int64) * BM * W
    for t in range(tl.program_id(0) // H, B * tiles, tl.num_programs(0) // H):
        b = (t // tiles).to(tl.int64)
        bh = (b * H + h).to(tl.int32)
        o_first = t % tiles * BM
        o = o_first + tl.arange(0, BM)
        i = token(o, order, SIDE)
        own = (h * B + b) * L
        own_k = k + b * k_sb + h // GROUP * k_sh
        own_v = v + b * v_sb + h // GROUP * v_sh
        own_ids = ids + b * ids_sb
        own_mask = mask + b * mask_sb + h * mask_sh
        own_columns = columns + (h * B + b) * S * W
        exact = load_rows(q + b * q_sb + h * q_sh, i, q_sl, L, D, D_BLOCK)
        queries = (exact * scale).to(exact.dtype)
        if SHARED:
            own_rows, at = rows + h * W, i * 0
        else:
            own_rows, at = rows + own * W, own_row(i, L) * W
            if ROWS > 0:
                fill_rows(
                    own_rows, exact, i, L, tables + h * W * STEP, bias + h * W, floor, scale,
                    BIAS, W, PIECE, STEP, D_BLOCK,
                )  # fmt: skip
        if MASS > 0:
            clear(scratch, BM, W, PIECE)
        tl.debug_barrier()

        best = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, E_BLOCK], tl.float32)
        for part in range(parts if SIDE > 0 else 1):
            hot, across = query_strips(
                units, units_so, o_first, part, BM, BN, SIDE, COLUMNS, queries
            )
            first, end = span(part, parts, last_key(i, L, S, CAUSAL), part_slots, slots, SIDE)
            for start in tl.range(first, end, BN, disable_licm=not HOIST):
                j = token(start + tl.arange(0, BN), others, SIDE)
                down, run_hot = key_strips(
                    runs, runs_so, o_first, start - part * part_slots, BM, BN, SIDE, COLUMNS,
                    queries,
                )  # fmt: skip
                keys = load_rows(own_k, j, k_sl, S, D, D_BLOCK)
                logits = pair_logits(
                    queries, keys, i, j, own_rows, at, ROWS,
                    own_columns, tl.minimum(j, S - 1) * W, COLUMNS, own_ids, ids_sm, ids_so,
                    down, hot, across, run_hot, own_mask, mask_sl, mask_ss, L, S,
                    MAPS, N, SIDE, MASK, CAUSAL, True,
                )  # fmt: skip
                higher = tl.maximum(best, tl.max(logits, 1))
                # A change of the shift scales what is in scratch: only changes that matter.
                changed = False
                if MASS > 0:
                    changed = tl.max((higher > best + 4.0).to(tl.int32)) > 0
                    higher = tl.where(changed, higher, best)
                # A row that saw nothing yet has no best: any finite number keeps its sums at zero.
                shift = tl.where(higher == float("-inf"), 0.0, higher)
                shrink = tl.exp2((best - shift) * LOG2E)
                p = exponential(logits, shift[:, None], 0.0, PRECISE)
                total = total * shrink + tl.sum(p, 1)
                if DROPOUT:
                    p = drop(p, seed, bh, i, j, S, dropout, factor)
                if MASS > 0:
                    if changed:
                        tl.debug_barrier()
                        for w in range(0, W, PIECE):
                            at_w = block(scratch, tl.arange(0, BM), w, W, PIECE)
                            held = tl.load(at_w, cache_modifier=".cg")
                            tl.store(at_w, held * shrink[:, None])
                        tl.debug_barrier()
                    scatter(
                        scratch, p, 0, MASS, own_ids, i, j, ids_sm, ids_so, down, hot,
                        MAPS, N, SIDE, DETERMINISTIC,
                    )  # fmt: skip
                values = load_rows(own_v, j, v_sl, S, E, E_BLOCK)
                acc = acc * shrink[:, None]
                acc = tl.dot(p.to(values.dtype), values, acc, input_precision="ieee")
                best = higher
        seen = total > 0.0
        total = tl.where(seen, total, 1.0)
        acc = acc / total[:, None]
        if MASS > 0:
            tl.debug_barrier()
            for first in range(0, W, PIECE):
                w = first + tl.arange(0, PIECE)
                at_w = block(scratch, tl.arange(0, BM), first, W, PIECE)
                held = (tl.load(at_w, cache_modifier=".cg") / total[:, None]).to(queries.dtype)
                table = tl.load(block(tables + (VALUE * H + h) * W * STEP, w, 0, STEP, E_BLOCK))
                acc = tl.dot(held, table, acc, input_precision="ieee")
            tl.debug_barrier()
        store_rows(out + b * out_sb + h * out_sh, acc, i, out_sl, L, E, E_BLOCK)
        # A row that sees nothing gets zeros: exp(-inf - 0), every probability of it, is zero.
        own_stats = stats + own + i
        tl.store(own_stats, tl.where(seen, best, 0.0), mask=i < L)
        tl.store(own_stats + H.to(tl.int64) * B * L, tl.log2(total), mask=i < L)


@triton.jit
def add_share(
    share, sums, x, known, fresh, factor, R: tl.constexpr, W: tl.constexpr, PIECE: tl.constexpr,
    SIDE: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add ``sums^T [W, R] @ x [R, BLOCK]`` to a program's share of a table's gradient.

    known: rows without garbage; None: all. x: None: add ``sums^T @ 1``. SIDE: 0 for a share of W
    rows; else it has those of ``share_rows``.
    """
    for first in range(0, W, PIECE):
        held = tl.load(block(sums, tl.arange(0, R), first, W, PIECE), cache_modifier=".cg")
        held = tl.where(known[:, None], held, 0.0)
        at, held, own = share_rows(first + tl.arange(0, PIECE), held, W, SIDE)
        if x is None:
            made = tl.sum(held, 0)[:, None]
        else:
            made = tl.dot(tl.trans(held.to(x.dtype)), x, input_precision="ieee")
        place = block(share, at, 0, STEP, BLOCK)
        before = tl.load(place, mask=(own & (fresh == 0))[:, None], other=0.0)
        tl.store(place, before + made * factor, mask=own[:, None])


@triton.jit(do_not_specialize=PLAIN)
def row_pass(
    q, k, v, out, grad, stats, delta, grad_mass, grad_q, ids, rows, columns, tables,
    scratch, scratch_mass, shares, bias_shares, mask, seed, order, others, runs, units,
    q_sb, q_sh, q_sl, k_sb, k_sh, k_sl, v_sb, v_sh, v_sl, out_sb, out_sh, out_sl,
    grad_sb, grad_sh, grad_sl, grad_q_sb, grad_q_sh, grad_q_sl,
    ids_sm, ids_sb, ids_so, mask_sb, mask_sh, mask_sl, mask_ss,
    B, H, GROUP, L, S, scale, dropout, factor, floor,
    tiles, runs_so, units_so, parts, part_slots, slots,
    D: tl.constexpr, E: tl.constexpr, D_BLOCK: tl.constexpr, E_BLOCK: tl.constexpr,
    STEP: tl.constexpr, W: tl.constexpr, MAPS: tl.constexpr, N: tl.constexpr,
    ROWS: tl.constexpr, SHARED: tl.constexpr, BIAS: tl.constexpr, COLUMNS: tl.constexpr,
    MASS: tl.constexpr, VALUE: tl.constexpr, WANTED: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, DETERMINISTIC: tl.constexpr,
    PRECISE: tl.constexpr, SIDE: tl.constexpr, SHARE: tl.constexpr, PIECE: tl.constexpr,
    HOIST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write grad_q, delta = sum_j p dp, grad_mass, and shares of query, value and bias tables."""
    SUMMED: tl.constexpr = ROWS > 0 and (not SHARED or WANTED)
    pid = tl.program_id(0).to(tl.int64)
    h = pid % H
    scratch += pid * BM * W
    scratch_mass += pid * BM * W
    begin = tl.program_id(0) // H
    for t in range(begin, B * tiles, tl.num_programs(0) // H):
        b = (t // tiles).to(tl.int64)
        bh = (b * H + h).to(tl.int32)
        o_first = t % tiles * BM
        o = o_first + tl.arange(0, BM)
        i = token(o, order, SIDE)
        own = (h * B + b) * L
        own_k = k + b * k_sb + h // GROUP * k_sh
        own_v = v + b * v_sb + h // GROUP * v_sh
        own_ids = ids + b * ids_sb
        own_mask = mask + b * mask_sb + h * mask_sh
        own_columns = columns + (h * B + b) * S * W
        own_mass = grad_mass + own * W
        at = own_row(i, L) * W
        if SHARED:
            own_rows, rows_at = rows + h * W, i * 0
        else:
            own_rows, rows_at = rows + own * W, at
        if SUMMED:
            clear(scratch, BM, W, PIECE)
        queries = load_rows(q + b * q_sb + h * q_sh, i, q_sl, L, D, D_BLOCK)
        queries = (queries * scale).to(queries.dtype)
        grad_out = load_rows(grad + b * grad_sb + h * grad_sh, i, grad_sl, L, E, E_BLOCK)
        if MASS > 0:
            if WANTED:
                clear(scratch_mass, BM, W, PIECE)
            fill_rows(
                own_mass, grad_out, i, L, tables + (VALUE * H + h) * W * STEP, tables,
                float("-inf"), 1.0, False, W, PIECE, STEP, E_BLOCK,
            )  # fmt: skip
        tl.debug_barrier()
        shift, log_total = load_stats(stats + own, i, B, H, L)
        outs = load_rows(out + b * out_sb + h * out_sh, i, out_sl, L, E, E_BLOCK)
        mean = tl.sum(outs.to(tl.float32) * grad_out.to(tl.float32), 1)
        tl.store(delta + own + i, mean, mask=i < L)

        acc = tl.zeros([BM, D_BLOCK], tl.float32)
        for part in range(parts if SIDE > 0 else 1):
            hot, across = query_strips(
                units, units_so, o_first, part, BM, BN, SIDE, COLUMNS, queries
            )
            first, end = span(part, parts, last_key(i, L, S, CAUSAL), part_slots, slots, SIDE)
            for start in tl.range(first, end, BN, disable_licm=not HOIST):
                j = token(start + tl.arange(0, BN), others, SIDE)
                down, run_hot = key_strips(
                    runs, runs_so, o_first, start - part * part_slots, BM, BN, SIDE, COLUMNS,
                    queries,
                )  # fmt: skip
                keys = load_rows(own_k, j, k_sl, S, D, D_BLOCK)
                logits = pair_logits(
                    queries, keys, i, j, own_rows, rows_at, ROWS,
                    own_columns, tl.minimum(j, S - 1) * W, COLUMNS, own_ids, ids_sm, ids_so,
                    down, hot, across, run_hot, own_mask, mask_sl, mask_ss, L, S,
                    MAPS, N, SIDE, MASK, CAUSAL, True,
                )  # fmt: skip
                p = exponential(logits, shift[:, None], log_total[:, None], PRECISE)
                values = load_rows(own_v, j, v_sl, S, E, E_BLOCK)
                dp = tl.zeros([BM, BN], tl.float32)
                if MASS > 0:
                    dp = add_rows(
                        dp, own_mass, at, MASS, own_ids, i, j, ids_sm, ids_so, down, hot,
                        MAPS, N, SIDE,
                    )  # fmt: skip
                dp = tl.dot(grad_out, tl.trans(values), dp, input_precision="ieee")
                if DROPOUT:
                    dp = drop(dp, seed, bh, i, j, S, dropout, factor)
                if MASS > 0 and WANTED:
                    given = p
                    if DROPOUT:
                        given = drop(p, seed, bh, i, j, S, dropout, factor)
                    scatter(
                        scratch_mass, given, 0, MASS, own_ids, i, j, ids_sm, ids_so, down, hot,
                        MAPS, N, SIDE, DETERMINISTIC,
                    )  # fmt: skip
                ds = p * (dp - mean[:, None])
                if SUMMED:
                    scatter(
                        scratch, ds, 0, ROWS, own_ids, i, j, ids_sm, ids_so, down, hot,
                        MAPS, N, SIDE, DETERMINISTIC,
                    )  # fmt: skip
                acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision="ieee")

        tl.debug_barrier()
        if ROWS > 0 and not SHARED:
            for first in range(0, W, PIECE):
                held = tl.load(
                    block(scratch, tl.arange(0, BM), first, W, PIECE), cache_modifier=".cg"
                )
                w = first + tl.arange(0, PIECE)
                table = tl.load(block(tables + h * W * STEP, w, 0, STEP, D_BLOCK))
                acc = tl.dot(held.to(queries.dtype), table, acc, input_precision="ieee")
        store_rows(grad_q + b * grad_q_sb + h * grad_q_sh, acc * scale, i, grad_q_sl, L, D, D_BLOCK)
        if WANTED:
            fresh = (t == begin).to(tl.int32)
            if ROWS > 0 and not SHARED:
                again = load_rows(q + b * q_sb + h * q_sh, i, q_sl, L, D, D_BLOCK)
                add_share(
                    shares + pid * SHARE * STEP, scratch, again, i < L, fresh, scale,
                    BM, W, PIECE, SIDE, STEP, D_BLOCK,
                )  # fmt: skip
            if MASS > 0:
                again = load_rows(grad + b * grad_sb + h * grad_sh, i, grad_sl, L, E, E_BLOCK)
                at_value = 0 if SHARED or ROWS == 0 else 1
                add_share(
                    shares + (at_value * tl.num_programs(0) + pid) * SHARE * STEP, scratch_mass,
                    again, i < L, fresh, 1.0, BM, W, PIECE, SIDE, STEP, E_BLOCK,
                )  # fmt: skip
            if BIAS:
                add_share(
                    bias_shares + pid * SHARE, scratch, None, i < L, fresh, 1.0,
                    BM, W, PIECE, SIDE, 1, 1,
                )  # fmt: skip
        tl.debug_barrier()


@triton.jit(do_not_specialize=PLAIN)
def column_pass(
    q, k, v, grad, stats, delta, grad_mass, grad_k, grad_v, ids, rows, columns, tables,
    scratch, shares, mask, seed, order, others, runs, units,
    q_sb, q_sh, q_sl, k_sb, k_sh, k_sl, v_sb, v_sh, v_sl, grad_sb, grad_sh, grad_sl,
    grad_k_sb, grad_k_sh, grad_k_sl, grad_v_sb, grad_v_sh, grad_v_sl,
    ids_sm, ids_sb, ids_so, mask_sb, mask_sh, mask_sl, mask_ss,
    B, H, GROUP, L, S, scale, dropout, factor,
    tiles, owned, runs_so, units_so, parts, part_slots,
    D: tl.constexpr, E: tl.constexpr, D_BLOCK: tl.constexpr, E_BLOCK: tl.constexpr,
    STEP: tl.constexpr, W: tl.constexpr, MAPS: tl.constexpr, N: tl.constexpr,
    ROWS: tl.constexpr, SHARED: tl.constexpr, COLUMNS: tl.constexpr, KEY: tl.constexpr,
    MASS: tl.constexpr, WANTED: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr, DETERMINISTIC: tl.constexpr, PRECISE: tl.constexpr,
    SIDE: tl.constexpr, PIECE: tl.constexpr, HOIST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write grad_k, grad_v, and shares of key tables. A program has one head of k and v.

    Sums of keys that are hidden or past the end mean nothing, and are dropped at the end.
    """
    pid = tl.program_id(0).to(tl.int64)
    G = H // GROUP
    kv = pid % G
    scratch += pid * BN * W
    begin = tl.program_id(0) // G
    for t in range(begin, B * tiles, tl.num_programs(0) // G):
        b = (t // tiles).to(tl.int64)
        start = t % tiles * BN
        j = token(start + tl.arange(0, BN), others, SIDE)
        own_ids = ids + b * ids_sb
        keys = load_rows(k + b * k_sb + kv * k_sh, j, k_sl, S, D, D_BLOCK)
        values = load_rows(v + b * v_sb + kv * v_sh, j, v_sl, S, E, E_BLOCK)
        columns_at = tl.minimum(j, S - 1) * W
        part = tl.minimum(start // tl.maximum(part_slots, 1), parts - 1)
        acc_k = tl.zeros([BN, D_BLOCK], tl.float32)
        acc_v = tl.zeros([BN, E_BLOCK], tl.float32)
        for member in range(GROUP):
            h = kv * GROUP + member
            bh = (b * H + h).to(tl.int32)
            own = (h * B + b) * L
            own_q = q + b * q_sb + h * q_sh
            own_grad = grad + b * grad_sb + h * grad_sh
            own_mask = mask + b * mask_sb + h * mask_sh
            own_columns = columns + (h * B + b) * S * W
            own_rows = rows + (h * W if SHARED else own * W)
            if COLUMNS > 0:
                clear(scratch, BN, W, PIECE)
                tl.debug_barrier()
            first = 0
            if CAUSAL:
                first = tl.maximum(tl.min(j) - (S - L), 0) // BM * BM
            for o_first in tl.range(first, owned, BM, disable_licm=not HOIST):
                o = o_first + tl.arange(0, BM)
                i = token(o, order, SIDE)
                at = tl.minimum(i, L - 1) * W
                queries = load_rows(own_q, i, q_sl, L, D, D_BLOCK)
                queries = (queries * scale).to(queries.dtype)
                hot, across = query_strips(
                    units, units_so, o_first, part, BM, BN, SIDE, COLUMNS, queries
                )
                down, run_hot = key_strips(
                    runs, runs_so, o_first, start - part * part_slots, BM, BN, SIDE, COLUMNS,
                    queries,
                )  # fmt: skip
                logits = pair_logits(
                    queries, keys, i, j, own_rows, i * 0 if SHARED else at, ROWS,
                    own_columns, columns_at, COLUMNS, own_ids, ids_sm, ids_so,
                    down, hot, across, run_hot, own_mask, mask_sl, mask_ss, L, S,
                    MAPS, N, SIDE, MASK, CAUSAL, False,
                )  # fmt: skip
                shift, log_total = load_stats(stats + own, i, B, H, L)
                p = exponential(logits, shift[:, None], log_total[:, None], PRECISE)
                grad_out = load_rows(own_grad, i, grad_sl, L, E, E_BLOCK)
                given = p
                if DROPOUT:
                    given = drop(p, seed, bh, i, j, S, dropout, factor)
                given = tl.trans(given.to(grad_out.dtype))
                acc_v = tl.dot(given, grad_out, acc_v, input_precision="ieee")
                dp = tl.zeros([BM, BN], tl.float32)
                if MASS > 0:
                    dp = add_rows(
                        dp, grad_mass + own * W, at, MASS, own_ids, i, j, ids_sm, ids_so, down,
                        hot, MAPS, N, SIDE,
                    )  # fmt: skip
                dp = tl.dot(grad_out, tl.trans(values), dp, input_precision="ieee")
                if DROPOUT:
                    dp = drop(dp, seed, bh, i, j, S, dropout, factor)
                mean = tl.load(delta + own + i, mask=i < L, other=0.0)
                ds = p * (dp - mean[:, None])
                turned = tl.trans(ds.to(queries.dtype))
                if COLUMNS > 0:
                    scatter(
                        scratch, turned if SIDE > 0 else ds, 1, COLUMNS, own_ids, i, j,
                        ids_sm, ids_so, across, run_hot, MAPS, N, SIDE, DETERMINISTIC,
                    )  # fmt: skip
                acc_k = tl.dot(turned, queries, acc_k, input_precision="ieee")
            if COLUMNS > 0:
                tl.debug_barrier()
                for w_first in range(0, W, PIECE):
                    held = tl.load(
                        block(scratch, tl.arange(0, BN), w_first, W, PIECE), cache_modifier=".cg"
                    )
                    held = (held * scale).to(keys.dtype)
                    w = w_first + tl.arange(0, PIECE)
                    table = block(tables + (KEY * H + h) * W * STEP, w, 0, STEP, D_BLOCK)
                    acc_k = tl.dot(held, tl.load(table), acc_k, input_precision="ieee")
                if WANTED:
                    share = pid // G * H + h
                    shown = shown_keys(j, mask + b * mask_sb, mask_ss, S, MASK)
                    add_share(
                        shares + share * W * STEP, scratch, keys, shown, (t == begin).to(tl.int32),
                        scale, BN, W, PIECE, 0, STEP, D_BLOCK,
                    )  # fmt: skip
                tl.debug_barrier()
        # Read again, so that addresses of the gradients take no registers in the loop.
        j = token(start + tl.arange(0, BN), others, SIDE)
        if MASK == "keys":
            shown = shown_keys(j, mask + b * mask_sb, mask_ss, S, MASK)[:, None]
            acc_k, acc_v = tl.where(shown, acc_k, 0.0), tl.where(shown, acc_v, 0.0)
        store_rows(grad_k + b * grad_k_sb + kv * grad_k_sh, acc_k, j, grad_k_sl, S, D, D_BLOCK)
        store_rows(grad_v + b * grad_v_sb + kv * grad_v_sh, acc_v, j, grad_v_sl, S, E, E_BLOCK)
