"""Fused attention with terms on a GPU: forward and backward without a ``[B, H, L, S]`` tensor.

plan.py describes a call by integers and computes once what depends on shapes alone, ops.py
registers the operators with torch, passes.py is what they do, launch.py starts the kernels:
kernels.py computes attention, from tiles.py; table_kernels.py reads the tables and sums their
gradients, by the lists of tables.py. Where tokens fill a grid strips.py orders them so that
strip_tiles.py gathers and scatters by matrix products.
"""

import importlib.util
import os
from collections.abc import Hashable

import torch
from torch import Tensor

from ..call import Call
from . import ops
from .plan import encode, short, span

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KINDS = frozenset({"bias", "query", "key", "value"})
WIDEST = 128  # head dim: tiles of wider ones do not fit into registers
MOST = 4096  # codes that are kept
OFFSETS = 2**31  # of int32, by which kernels address a head's numbers and dropout its pairs
# Triton itself is imported by the first launch. It reads this variable then, for good.
try:
    INSTALLED = importlib.util.find_spec("triton") is not None
except ImportError:  # an import hook blocks it
    INSTALLED = False
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def unsupported(call: Call) -> str | None:
    """Return why the kernels cannot compute this call, None if they can."""
    return absent(call.device) or _refused(call)


def preference(call: Call) -> tuple[int, str] | None:
    """Return the rank of this backend for a call, and why."""
    if call.device.type != "cuda":
        return None
    # In float32 the kernel does without tensor cores, and some of its variants spill.
    rank = 10 if call.q.dtype == torch.float32 else 40
    return rank, "fused kernels, no bias in memory (predicted fastest, not measured)"


def absent(device: torch.device) -> str | None:
    """Return why kernels cannot run on a device, None if they can."""
    here = device.type != "cuda" or torch.cuda.is_available()
    if not here:  # a device that ``irpe explain`` asks about
        return None
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


def _refused(call: Call) -> str | None:
    """Return why the kernels cannot compute these terms, dtypes or sizes, None if they can."""
    if call.traced:
        return "an exported or transformed graph has plain operations only"
    if call.mask_grad:
        return "it gives no gradient to the mask"
    refused = call.kinds - KINDS
    if refused:
        return f"its kernels have no {' and '.join(sorted(refused))} terms"
    if call.q.dtype not in DTYPES:
        return f"it computes in bfloat16, float16 or float32, not in {call.q.dtype}"
    if INTERPRETED and call.q.dtype == torch.bfloat16:
        return "Triton's interpreter cannot compute in bfloat16"
    head_dim = max(call.q.shape[-1], call.v.shape[-1])
    if head_dim > WIDEST:
        return f"head dim {head_dim} is more than {WIDEST}"
    length, keys = call.q.shape[-2], call.k.shape[-2]
    if length * keys >= OFFSETS:
        return f"{length * keys} pairs of a query and a key are 2**31 or more"
    return _too_large(call, length, keys)


def _too_large(call: Call, length: int, keys: int) -> str | None:
    """Return which tensor of ours has offsets that int32 does not hold; inputs can be copied."""
    longest = max(length, keys)
    wide = call.q.shape[1] * max(call.q.shape[-1], call.v.shape[-1])
    if longest * wide >= OFFSETS:
        return f"{longest} tokens of {wide} channels are 2**31 numbers or more"
    if not call.terms:
        return None
    numbers = sum(term.buckets.size + 31 for term in call.terms)  # at most, in a row
    if longest * numbers >= OFFSETS:
        return f"{longest} tokens of {numbers} buckets are 2**31 numbers or more"
    # Maps, at most one for each term, are padded to whole tiles; strips have fewer than twice as
    # many slots.
    ids = max(len(call.terms), 2) * (length + 127) * (keys + 127)
    return f"maps of {ids} bucket ids are 2**31 or more" if ids >= OFFSETS else None


def attention(call: Call) -> Tensor:
    """Return ``[B, H, L, E]``."""
    q, mask, seed = call.q, call.mask, None
    code, ids = _encoded(call)
    if mask is not None:
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        if mask.dim() > 1 and span(mask) >= OFFSETS:
            mask = mask.contiguous()
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], call.k.shape[2])
    if call.dropout_p > 0.0:
        seed = torch.randint(2**62, (1,), device=q.device)
    floats = [float(call.dropout_p), float(call.scale)]
    tables = [term.table for term in call.terms]
    tensors = (mask, seed, ids, q, call.k, call.v, *tables)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        out: Tensor = ops.FusedAttention.apply(code, floats, *tensors)
        return out
    given = [mask, seed, ids]
    return ops.fused_attention(q, call.k, call.v, tables, given, code, floats)[0]


_CODES: dict[Hashable, list[int]] = {}


def _encoded(call: Call) -> tuple[list[int], Tensor | None]:
    """``encode``, computed once for calls of equal shapes."""
    found = None if call.key is None else _CODES.get(call.key)
    if found is not None:
        return found, None
    code, ids = encode(call)
    if call.key is not None and ids is None:
        if len(_CODES) >= MOST:
            _CODES.clear()
        code = _CODES[call.key] = short(code)
    return code, ids
