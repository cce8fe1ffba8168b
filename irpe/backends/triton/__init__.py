"""Fused attention with terms on a GPU: forward and backward without a ``[B, H, L, S]`` tensor.

plan.py turns terms into rows of numbers, ops.py registers the operators with torch, launch.py
starts the kernels of kernels.py, which are built from tiles.py. Where tokens fill a grid strips.py
orders them so that strip_tiles.py gathers and scatters by matrix products.
"""

import importlib.util
import os

import torch
from torch import Tensor

from ..call import Call
from . import ops, strips
from .plan import mixed, plan, plan_strips, rows

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST = 128
PAIRS = 2**31
# Triton itself is imported by the first launch. It reads this variable then, for good.
try:
    INSTALLED = importlib.util.find_spec("triton") is not None
except ImportError:  # somebody keeps it out
    INSTALLED = False
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def absent(device: torch.device) -> str | None:
    """Why kernels cannot run on this device, None if they can."""
    if not INSTALLED:
        return "Triton is not installed"
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"its kernels run on a GPU, and q is on {device.type}"
    if torch.compiler.is_compiling():
        return None
    major = torch.cuda.get_device_capability(device)[0]
    return None if major >= 8 else f"it needs compute capability 8.0, and {device} has {major}"


def unsupported(
    kinds: frozenset[str], dtype: torch.dtype, head_dim: int, pairs: int, gain_maps: int
) -> str | None:
    """Why the kernels cannot compute such a call, None if they can."""
    refused = kinds & {"slope", "channels"}
    if refused:
        return f"its kernels have no {' and '.join(sorted(refused))} terms"
    if dtype not in DTYPES:
        return f"it computes in bfloat16, float16 or float32, not in {dtype}"
    if INTERPRETED and dtype == torch.bfloat16:
        return "Triton's interpreter cannot compute in bfloat16"
    if head_dim > WIDEST:
        return f"head dim {head_dim} is more than {WIDEST}"
    if pairs >= PAIRS:
        return f"{pairs} pairs of a query and a key are 2**31 or more"
    return "gain terms of more than one bucket function" if gain_maps > 1 else None


def attention(call: Call) -> Tensor:
    """``[B, H, L, E]``."""
    q, k, v, scale = call.q, call.k, call.v, call.scale
    on_grid = strips.applicable(call.terms, q.dtype, call.is_causal)
    made = plan_strips(call.terms) if on_grid else plan(call.terms)
    tables, uses = made.tables, made.uses
    row_table = tables["bias"].float() if "bias" in tables else None
    if "query" in tables:
        from_q = rows(q, tables["query"] * scale)
        row_table = from_q if row_table is None else from_q + row_table[:, None, None]
    columns = None
    if "key" in tables:
        keys, _ = call.grouped()
        columns = rows(keys, tables["key"] * scale)
    ids = ids_turned = order = others = runs = units = None
    side = parts = part_slots = 0
    if on_grid:
        slots = strips.strips(call.terms[0].buckets, q.device)
        ids, ids_turned = slots.ids[:1], slots.ids[1:]
        order, others, runs, units = slots.order, slots.others, slots.runs, slots.units
        side, parts, part_slots = slots.side, slots.parts, slots.part_slots
        # What is gathered enters a product: it has the dtype of its other side.
        row_table = None if row_table is None else row_table.to(q.dtype)
    elif made.maps:
        ids, ids_turned = made.ids(q.device)
    mask = call.mask
    if mask is not None:
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    seed = None
    if call.dropout_p > 0.0:
        seed = torch.randint(2**62, (1,), device=q.device)
    out, _, mass = ops.fused_attention(
        q, k, v, ids, ids_turned, row_table, columns, tables.get("gain"), mask, seed,
        order, others, runs, units, width=made.width,
        row_use=uses.get("bias", 0) | uses.get("query", 0),
        column_use=uses.get("key", 0), mass_use=uses.get("value", 0),
        gain_use=uses.get("gain", 0), is_causal=call.is_causal, dropout_p=float(call.dropout_p),
        scale=float(scale), side=side, parts=parts, part_slots=part_slots,
    )  # fmt: skip
    if "value" in tables:
        out = out + mixed(mass, tables["value"])
    return out
