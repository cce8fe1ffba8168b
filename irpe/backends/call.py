"""One attention call, validated, and the arithmetic that backends share."""

import contextlib
import os
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import IrpeError
from ..terms import Term


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """The arguments of ``irpe.attention``, validated.

    Args:
        q: ``[B, H, L, D]``, not scaled.
        k: ``[B, H | G, S, D]``.
        v: ``[B, H | G, S, E]``.
        terms: of q's dtype and device; a slope's table of any floating-point dtype. A backend that
            was registered with ``planned`` gets tables as they are kept, under autocast too.
        mask: as ``irpe.attention`` takes it.
        is_causal: query i sees the keys j <= i + S - L.
        dropout_p: a probability.
        scale: a number.
        device: where the call runs: q's device, or one that ``irpe explain`` asks about.
        compiled: whether torch.compile is on.
        traced: whether export, a trace, forward mode or a torch.func transform is on.
        key: equal for calls that differ in the values of tensors alone; None: unknown.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    terms: tuple[Term, ...]
    mask: Tensor | None
    is_causal: bool
    dropout_p: float
    scale: float
    device: torch.device
    compiled: bool = False
    traced: bool = False
    key: Hashable = None

    def cast(self) -> "Call":
        """Return the call with tables of q's dtype, which autocast asks for."""
        dtype = self.q.dtype
        if all(t.kind == "slope" or t.table.dtype == dtype for t in self.terms):
            return self
        terms = tuple(
            t if t.kind == "slope" else t.with_table(t.table.to(dtype)) for t in self.terms
        )
        return Call(
            self.q, self.k, self.v, terms, self.mask, self.is_causal, self.dropout_p, self.scale,
            self.device, self.compiled, self.traced,
        )  # fmt: skip

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of its terms."""
        return frozenset(term.kind for term in self.terms)

    @property
    def mask_grad(self) -> bool:
        """Whether the mask requires a gradient."""
        return self.mask is not None and self.mask.requires_grad

    def grouped(self) -> tuple[Tensor, Tensor]:
        """Return k and v with as many heads as q."""
        groups = self.q.shape[1] // self.k.shape[1]
        if groups == 1:
            return self.k, self.v
        return self.k.repeat_interleave(groups, 1), self.v.repeat_interleave(groups, 1)

    def merged_mask(self) -> tuple[Tensor | None, Tensor | None]:
        """Return one mask for ``mask`` and ``is_causal``, and the rows that see no key.

        Returns:
            The mask, bool (True: visible) or of q's dtype (added to the logits), broadcastable to
            ``[B, H, L, S]`` and open in rows that see no key; and these rows as a bool tensor
            broadcastable to ``[B, H, L, 1]``. Both None without a mask.

        A softmax over nothing is NaN and so is its gradient: such rows attend to everything and
        their output is set to zero afterwards, which leaves zero gradients.
        """
        mask = self.mask
        length, keys = self.q.shape[-2], self.k.shape[-2]
        # A single query is the last one, as in decoding: it sees all keys.
        if self.is_causal and (torch.jit.is_tracing() or length != 1):
            rows = torch.arange(length, device=self.q.device).unsqueeze(-1)
            causal = torch.arange(keys, device=self.q.device) <= rows + (keys - length)
            if mask is None:
                mask = causal
            elif mask.dtype == torch.bool:
                mask = mask & causal
            else:
                mask = mask.masked_fill(~causal, float("-inf"))
        if mask is None:
            return None, None
        if mask.dtype == torch.bool:
            dead = ~mask.any(-1, keepdim=True)
            return mask | dead, dead
        closed = mask == float("-inf")
        dead = closed.all(-1, keepdim=True)
        lowest = max(mask_floor(x.dtype) for x in (self.q, mask))
        mask = mask.clamp(min=lowest).masked_fill(closed, float("-inf"))
        return mask.masked_fill(dead, 0.0).to(self.q.dtype), dead


def mask_floor(dtype: torch.dtype) -> float:
    """Return the lowest finite number of an additive mask, half the lowest one of a dtype.

    Masks often hide a key by the lowest number itself. Plus a negative logit it would be -inf, and
    the softmax of a row of them NaN. The other half is left to the logit.
    """
    return torch.finfo(dtype).min / 2


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise IrpeError unless these are the queries, keys and values of one attention call."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise IrpeError(f"{name} is a tensor [B, H, L, D], not {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise IrpeError(f"{name} is of floating point, not {tensor.dtype}")
    if not q.dim() == k.dim() == v.dim() == 4:
        problem = "q, k and v are [B, H, L, D], not"
    elif k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        problem = "q [B, H, L, D], k and v [B, H, S, D] do not fit together:"
    elif k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        problem = f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads:"
    else:
        return
    raise IrpeError(f"{problem} q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}")


def expanded(table: Tensor, ids: Tensor) -> Tensor:
    """Return ``[H | 1, N]`` at ids ``[(B,) L, S]``: ``[1 | B, H | 1, L, S]``."""
    values = table[:, ids]
    return values.transpose(0, 1) if ids.dim() == 3 else values.unsqueeze(0)


def added(term: Term, q: Tensor) -> Tensor:
    """Return what a bias or slope adds to the logits, ``[1 | B, H | 1, L, S]`` of q's dtype."""
    if term.kind == "bias":
        return expanded(term.table, term.buckets.dense(q.device))
    wide = torch.promote_types(q.dtype, torch.float32)
    far = term.buckets.distances(q.device, wide)
    far = far.unsqueeze(1) if far.dim() == 3 else far
    return (term.table.to(wide).unsqueeze(-1) * far).to(q.dtype)


def project(x: Tensor, table: Tensor) -> Tensor:
    """Return ``[B, H, R, D] @ [H | 1, D, N]``; a shared table makes one product for all heads."""
    return x @ (table[0] if table.shape[0] == 1 else table)


# Read once, since torch 2.11 cannot compile the call; other types, such as meta, have none.
_AUTOCAST = {d for d in ("cpu", "cuda", "xpu", "mps", "mtia") if torch.amp.is_autocast_available(d)}


def autocasting(device: str) -> bool:
    """Return whether autocast is on for this type of device."""
    return device in _AUTOCAST and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> contextlib.AbstractContextManager[object]:
    """Return a context without autocast, for code that chooses its own precision."""
    if autocasting(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def exporting() -> bool:
    """Return whether torch.export is on."""
    # Not torch.compiler.is_exporting(): in torch 2.11 it is True while it compiles.
    return torch.compiler._is_exporting_flag


def transformed() -> bool:
    """Return whether export, a trace, forward mode or a torch.func transform is on."""
    return (
        exporting()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def debugging() -> bool:
    """Return whether the environment has IRPE_DEBUG=1; read at every call."""
    return os.environ.get("IRPE_DEBUG") == "1"


def check_ids(ids: Tensor, size: int) -> None:
    """Raise IrpeError for the first id, row by row, that is not in [0, size)."""
    wide = ids.to(torch.int64)
    wrong = ((wide < 0) | (wide >= size)).nonzero()
    if wrong.shape[0]:
        place = wrong[0].tolist()
        raise IrpeError(
            f"ids{place} is {int(wide[tuple(place)])}, but x has {size} buckets: "
            f"ids are at least 0 and less than {size}"
        )
