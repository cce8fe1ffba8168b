"""Blocks, warps and stages of each kernel: the ones that compile without spilling registers.

``python benchmarks/variants.py`` compiles them all and prints registers, spills and instructions.
The tables below are predictions from these numbers: no time was measured.
"""

from typing import Any, NamedTuple

import torch


class Variant(NamedTuple):
    """BM queries and BN keys in a tile; warps of a program; stages of its pipeline of loads.

    PIECE: numbers of a row in one product with a table. HOIST: see kernels.py. maxnreg: registers
    of a thread; ptxas spills some to run three programs at a time, unless it is given a number.
    """

    BM: int
    BN: int
    num_warps: int = 4
    num_stages: int = 2
    PIECE: int = 32
    HOIST: bool = True
    maxnreg: int | None = None


LARGE = Variant(64, 64, 4, 2, 64)
FLAT = Variant(64, 64, 4, 2, 16)
STILL = Variant(64, 64, 4, 1)
LONG = Variant(64, 64, 4, 1, 64)  # without a pipeline
PIPED = Variant(64, 32)
DEEP = PIPED._replace(maxnreg=255)
LOOSE = Variant(64, 32, HOIST=False)
HALF = Variant(64, 32, 4, 1)
FULL = HALF._replace(maxnreg=255)
OPEN = Variant(64, 32, 4, 1, HOIST=False)
FINE = Variant(64, 32, 4, 1, 16)
BARE = Variant(64, 32, 4, 1, 16, HOIST=False)
LEAN = Variant(32, 64, 4, 1, 16)
BROAD = Variant(32, 64, 4, 1, 16, HOIST=False)
TALL = Variant(32, 64, 4, 1)
EVEN = Variant(32, 32, 4, 1)
QUEUED = Variant(32, 32)
SMALL = Variant(32, 32, 4, 1, 16)
NARROW = Variant(16, 32, 4, 1, 16)
SLIM = NARROW._replace(maxnreg=255)
SPREAD = Variant(32, 32, 8, 1, 16)
SPARSE = Variant(32, 32, 16, 1)

# By kernel, for what it reads: rows of queries; rows of keys too, or biases on sm_80; value terms;
# value terms with 16 numbers a run; several maps, or value terms from maps.
Tiles = dict[str, tuple[Variant, Variant, Variant, Variant, Variant]]
HOPPER: Tiles = {  # sm_90
    "forward": (LARGE, LARGE, LARGE, FLAT, LARGE),
    "row_pass": (HALF, HALF, FINE, HALF, EVEN),
    "column_pass": (LONG, LEAN, LEAN, LEAN, SMALL),
}
BLACKWELL: Tiles = HOPPER | {  # sm_100
    "forward": (LARGE, LONG, LARGE, FLAT, LARGE),
    "row_pass": (HALF, HALF, OPEN, HALF, EVEN),
}
HOPPER_MORE: Tiles = {  # with a mask of pairs, dropout or deterministic sums
    "forward": (LARGE, HALF, HALF, HALF, HALF),
    "row_pass": (HALF, HALF, HALF, HALF, EVEN),
    "column_pass": (HALF, BARE, OPEN, EVEN, BARE),
}
HOPPER_THIN: Tiles = {  # head dims up to 32
    "forward": HOPPER["forward"],
    "row_pass": HOPPER_MORE["row_pass"],
    "column_pass": (LONG, HALF, HALF, FINE, TALL),
}
BLACKWELL_MORE: Tiles = HOPPER_MORE | {"row_pass": BLACKWELL["row_pass"]}
HOPPER_WIDE: Tiles = {  # head dims above 64
    "forward": (STILL, STILL, SMALL, SMALL, SMALL),
    "row_pass": (SPREAD, SPREAD, SPREAD, SPREAD, SPREAD),
    "column_pass": (BROAD, SPREAD, SPREAD, SPREAD, SPREAD),
}
AMPERE: Tiles = {  # sm_80, sm_86
    "forward": (LARGE, PIPED, PIPED, SMALL, FINE),
    "row_pass": (HALF, FINE, QUEUED, NARROW, NARROW),
    "column_pass": (HALF, HALF, HALF, SMALL, SMALL),
}
AMPERE_THIN: Tiles = {  # head dims up to 32
    "forward": (LARGE, LARGE, LARGE, HALF, HALF),
    "row_pass": (DEEP, HALF, HALF, SMALL, SMALL),
    "column_pass": (LONG, HALF, HALF, SMALL, SMALL),
}
AMPERE_MORE: Tiles = {  # sm_80, sm_86: with a mask, dropout or deterministic sums
    "forward": (PIPED, HALF, EVEN, SMALL, HALF),
    "row_pass": (EVEN, EVEN, SPREAD, SPREAD, EVEN),
    "column_pass": (HALF, EVEN, SPREAD, SMALL, SMALL),
}
AMPERE_WIDE: Tiles = {
    "forward": (PIPED, PIPED, EVEN, OPEN, SMALL),
    "row_pass": (SMALL, SPREAD, SPREAD, SPREAD, SPREAD),
    "column_pass": (TALL, SPREAD, SPREAD, SPREAD, SPREAD),
}
CONSUMER: Tiles = {  # sm_120
    "forward": (PIPED, PIPED, FINE, FINE, HALF),
    "row_pass": (HALF, HALF, SMALL, SLIM, NARROW),
    "column_pass": (PIPED, HALF, SMALL, SMALL, SMALL),
}
CONSUMER_THIN: Tiles = CONSUMER | {  # head dims up to 32
    "forward": (DEEP, PIPED, FINE, FINE, HALF),
    "row_pass": (FULL, HALF, SMALL, SLIM, NARROW),
}
CONSUMER_MORE: Tiles = AMPERE_MORE | {"column_pass": (HALF, SMALL, SMALL, SMALL, SMALL)}
CONSUMER_WIDE: Tiles = {
    "forward": (PIPED, LOOSE, LOOSE, LOOSE, LOOSE),
    "row_pass": (SPREAD, SPREAD, SPREAD, SPREAD, SPREAD),
    "column_pass": (BROAD, SPREAD, SPREAD, SPREAD, SPREAD),
}


def variant(
    kernel: str, dtype: torch.dtype, widest: int, options: dict[str, Any], capability: int
) -> Variant:
    """Return the variant of a kernel.

    Args:
        kernel: its name.
        dtype: of q.
        widest: the wider block of head dims, 16 to 128.
        options: the kernel's constants.
        capability: 10 * major + minor of the GPU.
    """
    if dtype == torch.float32:
        return NARROW
    if kernel == "project":
        return LARGE
    load = 2 if options["MASS"] else int(options["COLUMNS"] > 0)
    if load == 2 and options["SIDE"] == 16:
        load = 3
    if options["MAPS"] > 1 or (load == 2 and options["SIDE"] == 0):
        load = 4
    # Architecture, and tiles of head dims up to 32, up to 64 and wider ones.
    if capability >= 120:  # it multiplies as sm_80 does, from as little shared memory as sm_86 has
        own = (CONSUMER_THIN, CONSUMER, CONSUMER_WIDE, CONSUMER_MORE)
        if options["SIDE"] == 16 and kernel == "row_pass":
            load = max(load, 3)
    elif capability >= 90:
        own = (HOPPER_THIN, HOPPER, HOPPER_WIDE, HOPPER_MORE)
        if capability > 90:
            own = (HOPPER_THIN, BLACKWELL, HOPPER_WIDE, BLACKWELL_MORE)
    else:
        own = (AMPERE_THIN, AMPERE, AMPERE_WIDE, AMPERE_MORE)
        if options["SHARED"] and options["ROWS"]:
            load = max(load, 1)
        if options["SIDE"] == 16:
            load = max(load, 2 if kernel == "row_pass" else 1)
    thin, usual, wide, more = own
    # A mask of keys takes few registers.
    free = ("none", "keys") if load == 0 or 90 <= capability < 120 else ("none",)
    if options["DROPOUT"] or options["DETERMINISTIC"] or options["MASK"] not in free:
        chosen = more[kernel][load] if widest <= 64 else SPREAD
        both = options["DROPOUT"] and options["MASK"] != "none"
        if both and load >= 2 and kernel != "forward" and more is AMPERE_MORE and widest != 64:
            chosen = SPARSE._replace(PIECE=32 if widest < 64 else 64)
        return chosen._replace(maxnreg=255)
    tiles = wide if widest > 64 else usual if widest > 32 else thin
    chosen = tiles[kernel][load]
    # On others ptxas spills to run more programs at a time.
    return chosen if capability in (80, 90, 120) else chosen._replace(maxnreg=255)
