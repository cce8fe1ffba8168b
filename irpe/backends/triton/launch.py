"""Starts the kernels: shapes and strides in, a variant for each kernel from variants.py."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .plan import like
from .variants import variant


class Pairs:
    """What all kernels of a call know about its pairs of queries and keys."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ids: Tensor | None,
        rows: Tensor | None,
        columns: Tensor | None,
        gain: Tensor | None,
        mask: Tensor | None,
        seed: Tensor | None,
        order: Tensor | None,
        others: Tensor | None,
        runs: Tensor | None,
        units: Tensor | None,
        width: int,
        row_use: int,
        column_use: int,
        mass_use: int,
        gain_use: int,
        is_causal: bool,
        dropout_p: float,
        scale: float,
        side: int,
        parts: int,
        part_slots: int,
    ) -> None:
        (self.B, self.H, self.L, D), (_, G, self.S, E) = q.shape, v.shape
        # Where there is nothing to point at, q serves: the kernel never looks.
        given = {
            "ids": ids, "rows": _whole(rows), "columns": _whole(columns), "gain": _whole(gain),
            "mask": mask, "seed": seed, "order": order, "others": others,
            "runs": runs, "units": units,
        }  # fmt: skip
        self.tensors = {name: q if t is None else t for name, t in given.items()}
        head = {name: t is not None and t.shape[0] > 1 for name, t in (("r", rows), ("g", gain))}
        maps = 1 if ids is None else ids.shape[0]
        shared = rows is not None and rows.dim() == 2
        mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()
        self.scalars = {
            "rows_sh": maps * width if head["r"] and shared else 0,
            "gain_sh": maps * width if head["g"] else 0,
            **dict(zip(("mask_sb", "mask_sh", "mask_sl", "mask_ss"), mask_strides, strict=True)),
            "B": self.B, "H": self.H, "GROUP": self.H // G, "L": self.L, "S": self.S,
            "scale": scale, "dropout": dropout_p,
            "factor": 1 / (1 - dropout_p) if dropout_p < 1 else 0.0,
            "runs_so": 0 if runs is None else runs.shape[-1],
            "units_so": 0 if units is None else units.shape[-1],
            "parts": parts, "part_slots": part_slots,
            "slots": 0 if others is None else others.shape[0],
        }  # fmt: skip
        kind = "none" if mask is None else "bool" if mask.dtype == torch.uint8 else "float"
        self.wide = {"D": D, "D_BLOCK": _block(D)}
        self.wide_v = {"E": E, "E_BLOCK": _block(E)}
        self.options = {
            "MAPS": maps, "N": width, "ROWS": row_use, "SHARED": shared, "COLUMNS": column_use,
            "GAIN": gain_use.bit_length() - 1, "MASK": kind, "CAUSAL": is_causal,
            "DROPOUT": dropout_p > 0.0, "PRECISION": _precision(q),
            "PRECISE": q.dtype == torch.float32, "SIDE": side,
        }  # fmt: skip
        self.slots = None if order is None else order.shape[0]
        self.mass_use = mass_use
        self.dtype = q.dtype
        self.capability = _capability(q.device)

    def start(self, name: str, length: int, owners: int, **given: Any) -> None:
        """Launch a kernel: a program for each block of length tokens, and owner (batch * heads)."""
        options = {**self.options, **self.wide}
        if name != "mass":
            options |= self.wide_v
        widest = max(self.wide["D_BLOCK"], self.wide_v["E_BLOCK"])
        chosen = variant(name, self.dtype, widest, options | given, self.capability)
        owned = length if self.slots is None else self.slots
        tiles = -(-owned // (chosen.BN if name == "column_pass" else chosen.BM))
        tensors = dict(self.tensors)
        if self.slots is not None:
            turned = int(name == "column_pass")
            tensors |= {table: tensors[table][turned] for table in ("runs", "units")}
        if tiles * owners:
            getattr(kernels, name)[(tiles * owners,)](
                **given, **tensors, **self.scalars, **options, **chosen._asdict(), owned=owned
            )


def forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, mass: Tensor,
    ids: Tensor | None, ids_turned: Tensor | None, *pairs: Any, **settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Fill out, stats and, with a value term, mass."""
    q, k, v = (_unit(x) for x in (q, k, v))
    call = Pairs(q, k, v, ids, *pairs, **settings)
    B, H, L = call.B, call.H, call.L
    given = {"q": q, "k": k, **_strides("q", q), **_strides("k", k), **_ids(ids)}
    with torch.cuda.device_of(q):
        call.start(
            "forward", L, B * H, v=v, out=out, stats=stats, **given, **_strides("v", v),
            **_strides("o", out),
        )  # fmt: skip
        if mass.numel():
            sums = torch.zeros(mass.shape, dtype=torch.float32, device=mass.device)
            call.start(
                "mass", L, B * H, stats=stats, sums=sums, MASS=call.mass_use,
                DETERMINISTIC=torch.are_deterministic_algorithms_enabled(), **given,
            )  # fmt: skip
            mass = sums.to(mass.dtype)
    return out, stats, mass


def backward(
    grad: Tensor, grad_mass: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    stats: Tensor, mass: Tensor, ids: Tensor | None, ids_turned: Tensor | None,
    rows: Tensor | None, columns: Tensor | None, gain: Tensor | None, *pairs: Any,
    grad_rows: bool, grad_columns: bool, **settings: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k, v, rows, columns and gain; empty where there is none to give."""
    q, k, v, grad, out = (_unit(x) for x in (q, k, v, grad, out))
    call = Pairs(q, k, v, ids, rows, columns, gain, *pairs, **settings)
    B, H, L, S, G = call.B, call.H, call.L, call.S, k.shape[1]
    W = 1 if ids is None else ids.shape[0] * int(settings["width"])
    grads = [like(x) for x in (q, k, v)]
    wants_rows, wants_columns = rows is not None and grad_rows, columns is not None and grad_columns

    def sums(wanted: bool, length: int) -> Tensor:
        return q.new_zeros((H, B, length, W) if wanted else (0,), dtype=torch.float32)

    to_rows, to_columns = sums(wants_rows, L), sums(wants_columns, S)
    to_gain = sums(gain is not None, L)
    delta = torch.empty_like(stats[0])
    use = call.mass_use if grad_mass is not None else 0
    held = q if grad_mass is None else grad_mass.contiguous()
    options = {
        "MASS": use,
        "DETERMINISTIC": torch.are_deterministic_algorithms_enabled(),
    }
    given = {
        "q": q, "k": k, "v": v, "grad": grad, "stats": stats, "delta": delta, "grad_mass": held,
        **_strides("q", q), **_strides("k", k), **_strides("v", v), **_strides("g", grad),
    }  # fmt: skip
    with torch.cuda.device_of(q):
        call.start(
            "row_pass", L, B * H, out=out, masses=mass, grad_q=grads[0], grad_rows=to_rows,
            grad_gain=to_gain, GRAD_ROWS=settings["row_use"] if wants_rows else 0,
            **given, **_strides("o", out), **_strides("gq", grads[0]), **_ids(ids), **options,
        )  # fmt: skip
        call.tensors["ids"] = q if ids_turned is None else ids_turned
        call.start(
            "column_pass", S, B * G, grad_k=grads[1], grad_v=grads[2], grad_columns=to_columns,
            GRAD_COLUMNS=settings["column_use"] if wants_columns else 0,
            **given, **_strides("gk", grads[1]), **_strides("gv", grads[2]), **_ids(ids_turned),
            **options,
        )  # fmt: skip
    return (
        *grads,
        _summed(to_rows, rows) if rows is not None and grad_rows else q.new_empty(0),
        to_columns.to(columns.dtype) if columns is not None and grad_columns else q.new_empty(0),
        q.new_empty(0) if gain is None else _summed(to_gain, gain),
    )


def _summed(sums: Tensor, like: Tensor) -> Tensor:
    """Gradient of rows ``[H, B, L, W]``, or of what all queries share, ``[H | 1, W]``."""
    if like.dim() == 2:
        sums = sums.sum((1, 2))
        if like.shape[0] == 1:
            sums = sums.sum(0, keepdim=True)
    return sums.to(like.dtype)


def _block(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _whole(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_s{axis}": x.stride(n) for n, axis in enumerate("bhl")}


def _ids(ids: Tensor | None) -> dict[str, int]:
    if ids is None:
        return {"ids_sm": 0, "ids_sb": 0, "ids_so": 0}
    step = ids.stride(1) if ids.shape[1] > 1 else 0
    return {"ids_sm": ids.stride(0), "ids_sb": step, "ids_so": ids.stride(2)}


def _precision(x: Tensor) -> str:
    fast = torch.get_float32_matmul_precision() != "highest"
    return "tf32" if x.dtype == torch.float32 and fast else "ieee"
