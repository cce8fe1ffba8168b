"""A validated attention call, and functions that backends share."""

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
        terms: tables have q's device and dtype, except slopes, which may have any floating-point
            dtype. Under autocast, a backend with ``planned`` gets tables of their stored dtype.
        mask: see ``irpe.attention``.
        is_causal: query i attends to the keys j <= i + S - L.
        dropout_p: probability of attention dropout.
        scale: factor of the dot products.
        device: q's device, or the device that ``irpe explain`` is asked about.
        compiled: whether torch.compile is on.
        traced: whether export, a trace, forward mode or a torch.func transform is on.
        key: equal for calls that differ only in the values of tensors; None: unknown.
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
        """Return the call with tables cast to q's dtype, for autocast."""
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
        """The kinds of the terms."""
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
        """Return one mask for ``mask`` and ``is_causal``, and the fully masked rows.

        Returns:
            The mask, bool (True: visible) or of q's dtype (added to the logits), broadcastable to
            ``[B, H, L, S]``, with fully masked rows made visible; and these rows as a bool tensor
            broadcastable to ``[B, H, L, 1]``. Both None without a mask.

        The softmax of a fully masked row and its gradient are NaN. So such rows attend to all keys
        and the caller sets their output to zero, which makes their gradients zero.
        """
        mask = self.mask
        length, keys = self.q.shape[-2], self.k.shape[-2]
        if mask is not None and mask.dim() < 2:  # torch's attention takes [..., L, S]
            mask = mask.expand(1, keys)
        # A single query attends to all keys.
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
    """Return the lowest finite value of an additive mask: half the lowest value of a dtype.

    Masks often contain the lowest value itself. Its sum with a negative logit is -inf, and the
    softmax of a row of -inf is NaN.
    """
    return torch.finfo(dtype).min / 2


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise IrpeError unless q, k and v are valid arguments of one attention call."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise IrpeError(f"{name} is a tensor [B, H, L, D], not {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise IrpeError(f"{name} must be floating point, not {tensor.dtype}")
    if not q.dim() == k.dim() == v.dim() == 4:
        problem = "q, k and v are [B, H, L, D], not"
    elif k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        problem = "the shapes of q [B, H, L, D], k and v [B, H, S, D] do not match:"
    elif k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        problem = f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads:"
    elif q.shape[3] == 0:
        problem = "the head dim D is 0:"
    else:
        return
    raise IrpeError(f"{problem} q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}")


def expanded(table: Tensor, ids: Tensor) -> Tensor:
    """Return values ``[1 | B, H | 1, L, S]`` of a table ``[H | 1, N]`` at ids ``[(B,) L, S]``."""
    values = table[:, ids]
    return values.transpose(0, 1) if ids.dim() == 3 else values.unsqueeze(0)


def added(term: Term, q: Tensor) -> Tensor:
    """Return the additive bias of a bias or slope term, ``[1 | B, H | 1, L, S]`` of q's dtype."""
    if term.kind == "bias":
        return expanded(term.table, term.buckets.dense(q.device))
    wide = torch.promote_types(q.dtype, torch.float32)
    far = term.buckets.distances(q.device, wide)
    far = far.unsqueeze(1) if far.dim() == 3 else far
    return (term.table.to(wide).unsqueeze(-1) * far).to(q.dtype)


def project(x: Tensor, table: Tensor) -> Tensor:
    """Return ``[B, H, R, D] @ [H | 1, D, N]``, with one matrix product for a shared table."""
    return x @ (table[0] if table.shape[0] == 1 else table)


# Device types with autocast. Read once: torch 2.11 cannot compile the call.
_AUTOCAST = {d for d in ("cpu", "cuda", "xpu", "mps", "mtia") if torch.amp.is_autocast_available(d)}


def autocasting(device: str) -> bool:
    """Return whether autocast is on for this type of device."""
    return device in _AUTOCAST and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> contextlib.AbstractContextManager[object]:
    """Return a context that disables autocast."""
    if autocasting(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def exporting() -> bool:
    """Return whether torch.export is on."""
    # In torch 2.11, torch.compiler.is_exporting() is also True under torch.compile.
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
    """Raise IrpeError that states the first id outside [0, size)."""
    wide = ids.to(torch.int64)
    wrong = ((wide < 0) | (wide >= size)).nonzero()
    if wrong.shape[0]:
        place = wrong[0].tolist()
        raise IrpeError(
            f"ids{place} is {int(wide[tuple(place)])}, but x has {size} buckets: "
            f"ids are at least 0 and less than {size}"
        )
