"""Blocks, warps and stages of each kernel: the ones that compile without spilling registers.

``python benchmarks/variants.py`` compiles them all and prints registers, spills and instructions.
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
        return Variant(16, 32, num_stages=1, PIECE=16)
    if kernel == "column_pass":
        return Variant(64, 64, num_stages=1)
    if kernel == "row_pass":
        return Variant(64, 32, num_stages=1)
    return Variant(64, 64, PIECE=64)
