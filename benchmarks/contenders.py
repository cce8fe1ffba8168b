"""What benchmarks/attention.py compares: one attention call of a case, in every way there is.

Shapes: B batch, H heads, L queries and as many keys, D head dim, N buckets.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from original import FlatIndex, attention, build_original, load_original
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import irpe

MODES = {"bias": "bias-0-k", "k": "ctx-1-k", "qk": "ctx-1-qk", "qkv": "ctx-1-qkv"}
RATIOS = {"product": 1.9, "euc": 20.0, "cross": 20.0}  # the published ones
LIMITS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "no terms": None,
}
BASES = ("flash", "efficient", "math")  # the first that runs is what all else is compared with
WAYS = ("triton", "sdpa", "eager", "flex", "flat index", "original")

Forward = Callable[[], Tensor]


class Cannot(Exception):
    """A way that cannot do a case, with the reason."""


@dataclass(frozen=True)
class Case:
    """The shape of a call; ``method`` of its terms, ``dtype`` as torch names it."""

    height: int
    width: int
    prefix: int
    dim: int
    heads: int
    batch: int
    dtype: str
    method: str

    @property
    def length(self) -> int:
        return self.prefix + self.height * self.width

    def __str__(self) -> str:
        return f"{self.dtype} D={self.dim} {self.method} L={self.length}"

    def grid(self) -> irpe.Grid:
        """A new geometry, which remembers nothing of any other way."""
        return irpe.Grid(self.height, self.width, self.prefix)

    def spec(self, mode: str) -> irpe.RPE:
        return irpe.parse(f"rpe-{RATIOS[self.method]}-{self.method}-{MODES[mode]}")


class Inputs:
    """Random q, k, v ``[B, H, L, D]`` as a projection leaves them, and the tables of every mode."""

    def __init__(self, case: Case, device: str, batch: int | None = None) -> None:
        self.case, self.device = case, torch.device(device)
        dtype = getattr(torch, case.dtype)
        B, L, H, D = batch or case.batch, case.length, case.heads, case.dim
        qkv = torch.randn(B, L, 3, H, D, device=device, dtype=dtype).permute(2, 0, 3, 1, 4)
        self.qkv = tuple(x.requires_grad_() for x in qkv.unbind(0))
        self.grad = torch.randn(B, L, H, D, device=device, dtype=dtype).transpose(1, 2)
        self.modules = {}
        for mode in MODES:
            self.modules[mode] = irpe.build_rpe(
                case.spec(mode), head_dim=D, num_heads=H, prefix=case.prefix, device=device,
                dtype=dtype,
            )  # fmt: skip
            for parameter in self.tables(mode):
                torch.nn.init.normal_(parameter, std=0.3)

    def terms(self, mode: str) -> tuple[irpe.Term, ...]:
        """Terms of a mode on a geometry of their own; none for mode ""."""
        grid = self.case.grid()
        return sum((m.terms(grid) for m in self.modules.get(mode, ()) if m is not None), ())

    def tables(self, mode: str) -> list[Tensor]:
        modules = self.modules.get(mode, ())
        return [p for m in modules if m is not None for p in m.parameters()]


def limit(name: str, inputs: Inputs) -> Forward:
    """Attention without terms; "no terms" is our own kernel."""
    q, k, v = inputs.qkv
    chosen = LIMITS[name]
    if chosen is None:
        return lambda: irpe.attention(q, k, v, backend="triton")

    def forward() -> Tensor:
        with sdpa_kernel(chosen):
            return F.scaled_dot_product_attention(q, k, v)

    return forward


def way(name: str, mode: str, inputs: Inputs, original: Path | None) -> Forward:
    """Attention with the terms of a mode; raises where the way cannot do them."""
    q, k, v = inputs.qkv
    terms = inputs.terms(mode)
    scale = q.shape[-1] ** -0.5
    if name == "flat index":
        flat = FlatIndex(terms, inputs.device)
        return lambda: flat(q, k, v, scale)
    if name == "flex":
        return _flex(inputs, terms)
    if name == "original":
        return _original(mode, inputs, original)
    return lambda: irpe.attention(q, k, v, terms, backend=name)


def _flex(inputs: Inputs, terms: tuple[irpe.Term, ...]) -> Forward:
    """FlexAttention, its score_mod reading numbers captured from outside of the compiled region.

    They are float32: their gradients are summed into them, one score at a time.
    """
    if any(term.kind == "value" for term in terms):
        raise Cannot("a score_mod changes scores, and a value term needs the probabilities")
    q, k, v = inputs.qkv
    H, scale = q.shape[1], q.shape[-1] ** -0.5
    ids = [t.buckets.dense(inputs.device).to(torch.int32) for t in terms]
    kinds = tuple(term.kind for term in terms)
    on_cpu = inputs.device.type == "cpu"
    if on_cpu:  # it has no backward there
        q, k, v = (x.detach() for x in inputs.qkv)
    run = _flexed if on_cpu else torch.compile(_flexed, dynamic=False, fullgraph=True)

    def forward() -> Tensor:
        numbers = []
        for term in terms:
            if term.kind == "bias":
                rows = term.table.expand(H, -1)
            else:
                rows = ((q if term.kind == "query" else k) * scale) @ term.table
            # A copy: torch 2.11 gives no gradient to a captured view.
            rows = rows.to(torch.float32, copy=True)
            numbers.append(rows.detach() if on_cpu else rows)
        return run(q, k, v, kinds, numbers, ids)

    return forward


def _flexed(
    q: Tensor, k: Tensor, v: Tensor, kinds: tuple[str, ...], numbers: list[Tensor],
    ids: list[Tensor],
) -> Tensor:  # fmt: skip
    score_mod = _unchanged
    for kind, rows, index in zip(kinds, numbers, ids, strict=True):
        score_mod = _ADDED[kind](score_mod, rows, index)
    return flex_attention(q, k, v, score_mod=score_mod)


def _unchanged(score, b, h, i, j):
    return score


def _add_bias(inner, rows, ids):
    return lambda score, b, h, i, j: inner(score, b, h, i, j) + rows[h, ids[i, j]]


def _add_query(inner, rows, ids):
    return lambda score, b, h, i, j: inner(score, b, h, i, j) + rows[b, h, i, ids[i, j]]


def _add_key(inner, rows, ids):
    return lambda score, b, h, i, j: inner(score, b, h, i, j) + rows[b, h, j, ids[i, j]]


_ADDED = {"bias": _add_bias, "query": _add_query, "key": _add_key}


@functools.cache
def _loaded(folder: Path):
    return load_original(folder)


def _original(mode: str, inputs: Inputs, folder: Path) -> Forward:
    case = inputs.case
    modules = build_original(
        _loaded(folder), case.spec(mode), case.dim, case.heads, skip=case.prefix
    )
    q, k, v = inputs.qkv
    for theirs, ours in zip(modules, inputs.modules[mode], strict=True):
        if (theirs is None) != (ours is None):
            raise Cannot(f"it builds other modules for {case.spec(mode)}")
        if ours is not None:
            theirs.load_state_dict(ours.state_dict(keep_vars=True), assign=True)
    size = {"height": case.height, "width": case.width}
    return lambda: attention(q, k, v, modules, q.shape[-1] ** -0.5, **size)
