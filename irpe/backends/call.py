"""One attention call, validated, and the arithmetic that all backends share."""

import contextlib
import os
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import IrpeError
from ..terms import Term


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """The arguments of ``irpe.attention``; terms have q's dtype and device, scale is a number."""

    q: Tensor
    k: Tensor
    v: Tensor
    terms: tuple[Term, ...]
    mask: Tensor | None
    is_causal: bool
    dropout_p: float
    scale: float

    def grouped(self) -> tuple[Tensor, Tensor]:
        """k and v with as many heads as q."""
        groups = self.q.shape[1] // self.k.shape[1]
        if groups == 1:
            return self.k, self.v
        return self.k.repeat_interleave(groups, 1), self.v.repeat_interleave(groups, 1)

    def merged_mask(self) -> tuple[Tensor | None, Tensor | None]:
        """One mask for ``mask`` and ``is_causal``, and the rows that see nothing.

        Returns:
            The mask, bool (True: seen) or of q's dtype (added to the logits), broadcastable to
            ``[B, H, L, S]`` and open in rows that see nothing; and these rows as a bool tensor
            broadcastable to ``[B, H, L, 1]``. Both None without a mask.

        A softmax over nothing is NaN and so is its gradient: such rows attend to everything and
        their output is set to zero afterwards, which leaves zero gradients.
        """
        mask = self.mask
        length, keys = self.q.shape[-2], self.k.shape[-2]
        # A query by itself is the last one, as in decoding: it sees all keys.
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
        # Large negative numbers stay finite, also added to logits and in a lower dtype.
        lowest = max(torch.finfo(x.dtype).min for x in (self.q, mask)) / 2
        mask = mask.clamp(min=lowest).masked_fill(closed, float("-inf"))
        return mask.masked_fill(dead, 0.0).to(self.q.dtype), dead


def expanded(table: Tensor, ids: Tensor) -> Tensor:
    """``[H | 1, N]`` at ids ``[L, S]`` or ``[B, L, S]`` -> ``[1 | B, H | 1, L, S]``."""
    values = table[:, ids]
    return values.transpose(0, 1) if ids.dim() == 3 else values.unsqueeze(0)


def added(term: Term, q: Tensor) -> Tensor:
    """What a bias or slope term adds to the logits: ``[1 | B, H | 1, L, S]`` of q's dtype."""
    if term.kind == "bias":
        return expanded(term.table, term.buckets.dense(q.device))
    wide = torch.promote_types(q.dtype, torch.float32)
    far = term.buckets.distances(q.device, wide)
    far = far.unsqueeze(1) if far.dim() == 3 else far
    return (term.table.to(wide).unsqueeze(-1) * far).to(q.dtype)


def meet(x: Tensor, table: Tensor) -> Tensor:
    """``[B, H, R, D] @ [H | 1, D, N]``; a shared table makes one product for all heads."""
    return x @ (table[0] if table.shape[0] == 1 else table)


# Asked once, since torch 2.11 cannot compile the question; other types, as meta, have none.
_AUTOCAST = {d for d in ("cpu", "cuda", "xpu", "mps", "mtia") if torch.amp.is_autocast_available(d)}


def autocasting(device: str) -> bool:
    """Whether autocast is on for this type of device."""
    return device in _AUTOCAST and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> contextlib.AbstractContextManager[object]:
    """Autocast off, for what chooses its own precision."""
    if autocasting(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def exporting() -> bool:
    """Whether torch.export is on."""
    # Not torch.compiler.is_exporting(), which torch 2.11 answers with True while it compiles.
    return torch.compiler._is_exporting_flag


def transformed() -> bool:
    """Whether export, a trace, forward mode or a torch.func transform is on: plain operations."""
    return (
        exporting()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def debugging() -> bool:
    """Whether the environment has IRPE_DEBUG=1, read at every call."""
    return os.environ.get("IRPE_DEBUG") == "1"


def check_ids(ids: Tensor, size: int) -> None:
    """Raises IrpeError for the first id, row by row, that is not in [0, size)."""
    wide = ids.to(torch.int64)
    wrong = ((wide < 0) | (wide >= size)).nonzero()
    if wrong.shape[0]:
        place = wrong[0].tolist()
        raise IrpeError(
            f"ids{place} is {int(wide[tuple(place)])}, but x has {size} buckets: "
            f"ids are at least 0 and less than {size}"
        )
