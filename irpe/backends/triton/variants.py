"""Which blocks, warps and stages a kernel gets. A pure function."""

from typing import Any

import torch


def variant(
    name: str, dtype: torch.dtype, d_block: int, e_block: int, options: dict[str, Any]
) -> tuple[int, dict[str, int]]:
    """Owned tokens of a program, and the options of its launch."""
    wide = max(d_block, e_block) > 64
    if dtype == torch.float32:
        bm, bn, warps, stages = 32, 32, 4, 1
    elif wide:
        bm, bn, warps, stages = 64, 32, 4, 2
    else:
        bm, bn, warps, stages = 64, 64, 4, 2
    if name == "column_pass":
        bm, bn = bn, bm
    own = bn if name == "column_pass" else bm
    return own, {"BM": bm, "BN": bn, "num_warps": warps, "num_stages": stages}
