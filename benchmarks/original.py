"""The original iRPE as a contender: its own modules, and its formulation written out.

Shapes: B batch, H heads, L queries, S keys, D head dim, N buckets.
"""

import importlib.util
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import irpe


def load_original(folder: Path) -> types.ModuleType:
    """The original's irpe.py, from a checkout of it; it wants easydict for one dict."""
    if "easydict" not in sys.modules and importlib.util.find_spec("easydict") is None:
        stand_in = types.ModuleType("easydict")
        stand_in.EasyDict = type(  # type: ignore[attr-defined]
            "EasyDict", (dict,), {"__getattr__": dict.get, "__setattr__": dict.__setitem__}
        )
        sys.modules["easydict"] = stand_in
    path = folder / "irpe.py"
    if not path.is_file():
        sys.exit(f"error: --original {folder}: there is no irpe.py in it")
    module_spec = importlib.util.spec_from_file_location("original_irpe", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def build_original(
    original: types.ModuleType, spec: irpe.RPE, head_dim: int, heads: int, skip: int
) -> tuple[Any, Any, Any]:
    """The original's (rpe_q, rpe_k, rpe_v) of a spec; skip: its number of prefix tokens."""
    config = original.get_rpe_config(
        ratio=spec.ratio, method=spec.method, mode=spec.mode, shared_head=spec.shared, skip=skip,
        rpe_on=spec.on,
    )  # fmt: skip
    rpe_q, rpe_k, rpe_v = original.build_rpe(config, head_dim=head_dim, num_heads=heads)
    return rpe_q, rpe_k, rpe_v


def attention(
    q: Tensor, k: Tensor, v: Tensor, modules: Sequence[Any], scale: float, **size: int
) -> Tensor:
    """Attention ``[B, H, L, D]`` as the original's hosts compute it, of the original's modules."""
    rpe_q, rpe_k, rpe_v = modules
    q = q * scale
    logits = q @ k.transpose(-2, -1)
    if rpe_k is not None:
        logits = logits + rpe_k(q, **size)
    if rpe_q is not None:
        logits = logits + rpe_q(k * scale, **size).transpose(2, 3)
    probabilities = logits.softmax(-1)
    out = probabilities @ v
    return out if rpe_v is None else out + rpe_v(probabilities, **size)


class FlatIndex:
    """The original's formulation: rows of numbers laid end to end, ``[B, H, L * N]``, indexed flat.

    A value term expands its table to a vector for every pair, ``[L, S, D]`` for each head of it.
    """

    def __init__(self, terms: Sequence[irpe.Term], device: torch.device) -> None:
        self.terms = terms
        self.index = []
        for term in terms:
            ids = term.buckets.dense(device)
            if term.kind == "key":
                ids = ids.t()
            if term.kind in ("query", "key"):
                ids = ids + torch.arange(len(ids), device=device).unsqueeze(-1) * term.buckets.size
            self.index.append(ids.flatten())

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        (B, H, L, D), S = q.shape, k.shape[-2]
        q = q * scale
        logits = q @ k.transpose(-2, -1)
        for term, index in zip(self.terms, self.index, strict=True):
            if term.kind == "bias":  # in float32, as a parameter is under autocast
                bias = term.table.float().index_select(1, index).to(q.dtype)
                logits = logits + bias.view(1, -1, L, S)
            elif term.kind == "query":
                rows = (q @ term.table).flatten(2)
                logits = logits + rows.index_select(2, index).view(B, H, L, S)
            elif term.kind == "key":
                rows = ((k * scale) @ term.table).flatten(2)
                logits = logits + rows.index_select(2, index).view(B, H, S, L).transpose(2, 3)
        p = logits.softmax(-1)
        out = p @ v
        for term, index in zip(self.terms, self.index, strict=True):
            if term.kind == "value":  # tables are shared by all heads
                pairs = term.table[0].index_select(0, index).view(L, S, D)
                mixed = p.permute(2, 0, 1, 3).reshape(L, B * H, S) @ pairs
                out = out + mixed.view(L, B, H, D).permute(1, 2, 0, 3)
        return out
