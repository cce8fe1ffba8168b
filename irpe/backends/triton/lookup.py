"""The operators ``irpe::lookup`` and ``irpe::lookup_backward``, each the other's gradient.

Both are linear, so derivatives of any order are made of the two. Every number they write belongs
to one program and is summed in one order: no atomics, the same bits in every run.
"""

from typing import Any

import torch
from torch import Tensor

from ..call import check_ids, debugging, transformed
from . import DTYPES, INTERPRETED, absent

DEVICES = ("cuda",)


def able(x: Tensor) -> bool:
    """Whether the operators compute a lookup in x; what they do not, the reference does."""
    if x.device.type not in DEVICES or x.dtype not in DTYPES or transformed():
        return False
    return absent(x.device) is None and not (INTERPRETED and x.dtype == torch.bfloat16)


@torch.library.custom_op("irpe::lookup", mutates_args=(), schema="(Tensor x, Tensor ids) -> Tensor")
def lookup(x: Tensor, ids: Tensor) -> Tensor:
    """``y[b, h, i, j] = x[b, h, i, ids[(b,) i, j]]``.

    Args:
        x: ``[B, H, L, N]`` of bfloat16, float16 or float32, any strides.
        ids: ``[L, S]`` or ``[B | 1, L, S]`` of an integer dtype, any strides.

    Returns:
        ``[B, H, L, S]``, contiguous.
    """
    if debugging():
        check_ids(ids, x.shape[-1])
    y = x.new_empty(*x.shape[:-1], ids.shape[-1])
    rows, strides = _grouped(x, ids)
    pairs = ids.shape[-2] * ids.shape[-1]
    BM, BN = 8, 1024
    _start(
        "lookup", _owners(x, rows, BM) * -(-pairs // BN), x=x, ids=ids, y=y,
        **_strides("x", x, "bhln"), **strides, pairs=pairs, R=rows, H=x.shape[1],
        S=ids.shape[-1], BM=BM, BN=BN, num_warps=4,
    )  # fmt: skip
    return y


@torch.library.custom_op(
    "irpe::lookup_backward", mutates_args=(), schema="(Tensor g, Tensor ids, SymInt size) -> Tensor"
)
def lookup_backward(g: Tensor, ids: Tensor, size: int) -> Tensor:
    """``[B, H, L, N]``, N = size: g ``[B, H, L, S]`` summed by bucket in float32, rounded once.

    A number that is not finite may spread over the buckets of its query.
    """
    (_, H, L, S), out = g.shape, g.new_empty(*g.shape[:-1], size)
    rows, strides = _grouped(g, ids)
    exact = g.dtype == torch.float32  # no tensor cores: tiles lie in registers
    BM, BN = 16 if rows <= 16 else 64, 32 if exact else 64
    buckets = next(n for n in (16, 32, 64) if n >= min(size, 64))
    _start(
        "lookup_backward", _owners(g, rows, BM) * L * -(-size // buckets), g=g, ids=ids, out=out,
        **_strides("g", g, "bhls"), **strides, R=rows, H=H, L=L, S=S, N=size, BM=BM, BN=BN,
        BUCKETS=buckets, SEVERAL=size > buckets, num_warps=8 if exact and BM == 64 else 4,
        num_stages=1 if exact else 2,
    )  # fmt: skip
    return out


@lookup.register_fake
def _(x: Tensor, ids: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], ids.shape[-1])


@lookup_backward.register_fake
def _(g: Tensor, ids: Tensor, size: int) -> Tensor:
    return g.new_empty(*g.shape[:-1], size)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.size = inputs[0].shape[-1]


def _setup_backward(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


lookup.register_autograd(
    lambda ctx, g: (lookup_backward(g, *ctx.saved_tensors, ctx.size), None), setup_context=_setup
)
lookup_backward.register_autograd(
    lambda ctx, g: (lookup(g, *ctx.saved_tensors), None, None), setup_context=_setup_backward
)


def _grouped(x: Tensor, ids: Tensor) -> tuple[int, dict[str, int]]:
    """Rows that share their ids, and the strides of ids."""
    own = ids.dim() == 3 and ids.shape[0] > 1
    rows = x.shape[1] if own else x.shape[0] * x.shape[1]
    return rows, {"ids_sb": ids.stride(0) if own else 0, **_strides("ids", ids, "ls")}


def _owners(x: Tensor, rows: int, block: int) -> int:
    """Blocks of rows, in all groups."""
    return x.shape[0] * x.shape[1] // max(rows, 1) * -(-rows // block)


def _strides(name: str, x: Tensor, axes: str) -> dict[str, int]:
    steps = x.stride()[-len(axes) :]
    return {f"{name}_s{axis}": step for axis, step in zip(axes, steps, strict=True)}


def _start(name: str, programs: int, **given: Any) -> None:
    from . import lookup_kernels

    if programs:
        with torch.cuda.device_of(given["ids"]):
            getattr(lookup_kernels, name)[(programs,)](**given)
