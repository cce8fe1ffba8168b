"""Blocks, warps and stages of each kernel: the ones that compile without spilling registers.

``python benchmarks/variants.py`` compiles them all and prints registers, spills and instructions.
The tables below are predictions from these numbers: no time was measured.
"""

from typing import Any, NamedTuple

import torch


class Variant(NamedTuple):
    """BM queries and BN keys in a tile; warps of a program; stages of its pipeline of loads.

    PIECE: numbers of a row in one product with a table. HOIST: see kernels.py.
    """

    BM: int
    BN: int
    num_warps: int = 4
    num_stages: int = 2
    PIECE: int = 32
    HOIST: bool = True


LARGE = Variant(64, 64, 4, 2, 64)
LONG = Variant(64, 64, 4, 1, 64)  # without a pipeline
BARE = Variant(64, 64, 4, 1, 64, HOIST=False)
PIPED = Variant(64, 32)
LOOSE = Variant(64, 32, HOIST=False)
HALF = Variant(64, 32, 4, 1)
SLOW = Variant(64, 32, 4, 1, HOIST=False)
TALL = Variant(32, 64, 4, 1)
SMALL = Variant(32, 32, 4, 1, 16)
SPREAD = Variant(32, 32, 8, 1, 16)

# By kernel, for what it reads: rows of queries; rows of keys too; value terms; several maps.
Tiles = dict[str, tuple[Variant, Variant, Variant, Variant]]
HOPPER: Tiles = {  # sm_90, sm_100
    "forward": (LARGE, LARGE, LARGE, LARGE),
    "row_pass": (PIPED, PIPED, HALF, HALF),
    "column_pass": (LONG, BARE, HALF, HALF),
}
HOPPER_WIDE: Tiles = {  # head dims above 64
    "forward": (LARGE, LARGE, LARGE, LOOSE),
    "row_pass": (PIPED, PIPED, SPREAD, SPREAD),
    "column_pass": (TALL, SPREAD, SPREAD, SPREAD),
}
AMPERE: Tiles = {  # sm_80, sm_86, sm_120
    "forward": (LARGE, LARGE, PIPED, PIPED),
    "row_pass": (PIPED, HALF, SMALL, SMALL),
    "column_pass": (BARE, HALF, HALF, HALF),
}
AMPERE_WIDE: Tiles = {
    "forward": (LARGE, PIPED, LOOSE, LOOSE),
    "row_pass": (SLOW, SPREAD, SPREAD, SPREAD),
    "column_pass": (TALL, SPREAD, SPREAD, SPREAD),
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
        return Variant(16, 32, 4, 1, 16)
    if kernel == "project":
        return LARGE
    # sm_120 multiplies matrices as sm_80 does, from as little shared memory as sm_86 has.
    if 90 <= capability < 120:
        tiles = HOPPER_WIDE if widest > 64 else HOPPER
    else:
        tiles = AMPERE_WIDE if widest > 64 else AMPERE
    load = 3 if options["MAPS"] > 1 else 2 if options["MASS"] else int(options["COLUMNS"] > 0)
    return tiles[kernel][load]
