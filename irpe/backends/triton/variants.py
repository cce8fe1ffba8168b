"""Blocks, warps and stages of each kernel: the ones that compile without spilling registers.

``python benchmarks/variants.py`` compiles them all and prints registers, spills and instructions.
"""

from typing import Any, NamedTuple

import torch


class Variant(NamedTuple):
    """BM queries and BN keys in a tile; warps of a program; stages of its pipeline of loads."""

    BM: int
    BN: int
    num_warps: int = 4
    num_stages: int = 2


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
    # sm_120 multiplies matrices as sm_80 does, from as little shared memory as sm_86 has.
    ampere, wide = not 90 <= capability < 120, widest > 64
    several = options["MAPS"] > 1
    if dtype == torch.float32:
        return Variant(16, 32, num_stages=1)
    if options["SIDE"]:
        found = _on_strips(kernel, widest, options, ampere)
        if found is not None:
            return found
    if kernel == "forward":
        return Variant(64, 32) if wide or (ampere and widest <= 32) else Variant(64, 64)
    if kernel == "mass":
        return Variant(64, 32 if several or wide else 64)
    if wide and ampere and several:
        return Variant(16, 32, num_stages=1) if kernel == "row_pass" else Variant(32, 16)
    if kernel == "row_pass":
        if wide or (ampere and several):
            return Variant(32, 32, num_stages=2 if options["MASS"] and not several else 1)
        return Variant(64, 32, num_stages=1 if several and widest == 64 else 2)
    heavy = options["MASS"] or (widest > 32 and (options["ROWS"] or options["COLUMNS"]))
    if ampere and options["MASS"] and widest <= 32:
        return Variant(32, 16) if several else Variant(32, 32, num_warps=8, num_stages=1)
    if wide or (ampere and heavy):
        return Variant(32, 32, num_stages=1)
    return Variant(32, 64, num_stages=2 if ampere and widest <= 32 else 1)


def _on_strips(kernel: str, widest: int, options: dict[str, Any], ampere: bool) -> Variant | None:
    """Return a variant for strips, whose products need more registers; None: as without strips."""
    both = options["COLUMNS"]
    if widest > 64:
        if kernel == "row_pass":
            return Variant(32, 32, num_warps=8, num_stages=1)
        if kernel == "forward" and both:
            return Variant(64, 32, num_warps=8)
    elif widest > 32:
        if not ampere:
            heavy = kernel == "column_pass" and both and options["MASS"]
            return Variant(32, 32, num_stages=1) if heavy else None
        if kernel == "forward" and both:
            return Variant(64, 32)
        if kernel == "column_pass" or (kernel == "row_pass" and both):
            return Variant(32, 32, num_stages=1)
    elif kernel == "forward" and both:
        return Variant(64, 32, num_stages=1 if ampere and widest == 32 else 2)
    elif ampere:
        if kernel == "mass":
            return Variant(64, 32)
        if kernel == "row_pass" and options["SIDE"] > 8:
            return Variant(64, 32, num_stages=1)
        if kernel == "column_pass":
            if widest == 32:
                return Variant(32, 32, num_stages=1)
            return Variant(32, 32) if options["MASS"] else Variant(32, 64, num_stages=1)
    return None
