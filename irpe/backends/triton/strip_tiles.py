"""Gather and scatter on whole grids, by products with one-hot matrices instead of addresses.

Queries come in units of 16 patches of one grid column, keys in runs of 16 patches of one grid row,
see strips.py. The bucket of a pair has a row part a, the same for a query and a run, and a column
part c, the same for a key and a unit. In a row of numbers of a query the number of a pair is at
``a * SIDE + c``: the query and a run read SIDE neighbours, and a one-hot matrix selects among them
by c. In a row of a key it is at ``c * SIDE + a``: the key and a unit read SIDE neighbours, and the
matrix selects by a. A product has 16 numbers: of two runs or units where SIDE is 8.

Shapes: R tokens and C tokens of the other side in a tile, G = R / 16 groups, P = C / 16 parts.
"""

import triton
import triton.language as tl


@triton.jit
def onehot(part, SIDE: tl.constexpr, like):
    """Return one-hot matrices ``[G, 16, 256 / SIDE]`` from parts ``[G, 256 / SIDE]`` of lanes."""
    lane = tl.arange(0, 256 // SIDE)
    wanted = (lane // 16 * SIDE)[None, :] + part
    return (tl.arange(0, 16)[None, :, None] == wanted[:, None, :]).to(like.dtype)


@triton.jit
def unit_onehot(units, unit, G: tl.constexpr, part, step, SIDE: tl.constexpr, like):
    """Return the matrices that select by column part, of G units and the columns of a part."""
    lane = part * 16 + tl.arange(0, 256 // SIDE) % 16
    own = unit + tl.arange(0, G)
    return onehot(tl.load(units + own[:, None] * step + lane[None, :]).to(tl.int32), SIDE, like)


@triton.jit
def run_onehot(runs, first, start, G: tl.constexpr, step, SIDE: tl.constexpr, like):
    """Return the matrices that select by row part, of G runs and the unit at slot first."""
    lane = first + tl.arange(0, 256 // SIDE) % 16
    run = start // 16 + tl.arange(0, G)
    return onehot(tl.load(runs + lane[None, :] * step + run[:, None]).to(tl.int32), SIDE, like)


@triton.jit
def row_parts(runs, first, start, R: tl.constexpr, P: tl.constexpr, step):
    """Return the row parts ``[R, P]`` of queries and runs from a slot of a part on."""
    run = start // 16 + tl.arange(0, P)
    own = first + tl.arange(0, R)
    return tl.load(runs + own[:, None] * step + run[None, :]).to(tl.int32)


@triton.jit
def column_parts(units, unit, part, R: tl.constexpr, P: tl.constexpr, step):
    """Return the column parts ``[R, P]`` of keys and the units from a unit on."""
    lane = part * 16 + tl.arange(0, R) % 16
    own = unit + tl.arange(0, P)
    return tl.load(units + own[None, :] * step + lane[:, None]).to(tl.int32)


@triton.jit
def batched(tile, R: tl.constexpr, TIMES: tl.constexpr, WIDE: tl.constexpr):
    """Return a tile ``[R, TIMES * WIDE]`` as ``[TIMES * R / 16, 16, WIDE]``.

    A warp has a group of 16 tokens here as in the products of the whole tile, so that numbers stay
    in its registers.
    """
    tile = tl.permute(tl.reshape(tile, [R // 16, 16, TIMES, WIDE]), (2, 0, 1, 3))
    return tl.reshape(tile, [TIMES * (R // 16), 16, WIDE])


@triton.jit
def joined(tile, R: tl.constexpr, TIMES: tl.constexpr, WIDE: tl.constexpr):
    """Return ``[R, TIMES * WIDE]``: the reverse of ``batched``."""
    tile = tl.permute(tl.reshape(tile, [TIMES, R // 16, 16, WIDE]), (1, 2, 0, 3))
    return tl.reshape(tile, [R, TIMES * WIDE])


@triton.jit
def repeated(hot, TIMES: tl.constexpr):
    """Return one-hot matrices ``[TIMES * G, 16, 256 / SIDE]``, all of them TIMES times."""
    if TIMES > 1:
        G: tl.constexpr = hot.shape[0]
        WIDE: tl.constexpr = hot.shape[2]
        hot = tl.broadcast_to(hot[None, :, :, :], [TIMES, G, 16, WIDE])
        hot = tl.reshape(hot, [TIMES * G, 16, WIDE])
    return hot


@triton.jit
def strip_gather(tile, numbers, at, parts, hot, SIDE: tl.constexpr):
    """Return tile ``[R, C]`` plus the number of each pair, from rows that start at ``at [R]``."""
    R: tl.constexpr = parts.shape[0]
    P: tl.constexpr = parts.shape[1]
    TIMES: tl.constexpr = P * SIDE // 16
    place = (at[:, None] + parts * SIDE)[:, :, None] + tl.arange(0, SIDE)[None, None, :]
    place = tl.reshape(place, [R, P * SIDE])
    place = tl.max_contiguous(tl.multiple_of(place, [1, SIDE]), [1, SIDE])
    own = batched(tl.load(numbers + place), R, TIMES, 16)
    tile = batched(tile, R, TIMES, 256 // SIDE)
    return joined(tl.dot(own, repeated(hot, TIMES), tile), R, TIMES, 256 // SIDE)


@triton.jit
def strip_scatter(
    sums, tile, at, parts, hot, SIDE: tl.constexpr, DETERMINISTIC: tl.constexpr
):  # fmt: skip
    """``sums[at[r] + part * SIDE + selected] += tile[r, c]``; sums are float32, of a program."""
    R: tl.constexpr = parts.shape[0]
    P: tl.constexpr = parts.shape[1]
    TIMES: tl.constexpr = P * SIDE // 16
    own = batched(tile.to(hot.dtype), R, TIMES, 256 // SIDE)
    found = tl.dot(own, tl.permute(repeated(hot, TIMES), (0, 2, 1)))
    found = tl.reshape(joined(found, R, TIMES, 16), [R, P, SIDE])
    number = tl.arange(0, SIDE)
    if DETERMINISTIC:
        # One address per token and step, of one thread: one order of additions.
        step = tl.arange(0, P)
        for n in range(P):
            one = tl.sum(tl.where((step == n)[None, :, None], found, 0.0), 1)
            part = tl.sum(tl.where((step == n)[None, :], parts, 0), 1)
            place = sums + ((at + part * SIDE)[:, None] + number[None, :])
            tl.store(place, tl.load(place) + one)
    else:
        place = (at[:, None] + parts * SIDE)[:, :, None] + number[None, None, :]
        tl.atomic_add(sums + place, found, sem="relaxed")


@triton.jit
def share_rows(number, sums, W: tl.constexpr, SIDE: tl.constexpr):
    """Return where in a share the sums ``[R, N]`` of N numbers are added, the sums, and which are.

    On strips pairs with a prefix token have SIDE numbers, whose sums are added up; see
    ``strips.share``.
    """
    own = number >= 0
    if SIDE > 0:
        SIDES: tl.constexpr = W // SIDE - 1  # row parts of patches
        first, second = number // SIDE, number % SIDE
        prefix = (first == SIDES)[None, :]
        sums = tl.where(prefix, tl.sum(tl.where(prefix, sums, 0.0), 1)[:, None], sums)
        own = (second < SIDES) & (first < SIDES) | ((second == SIDES) & (first == SIDES))
        number = tl.minimum(first * SIDES + second, SIDES * SIDES)
    return number, sums, own
