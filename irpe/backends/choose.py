"""Which backend computes a call: a pure function of the call's facts, with its reasons."""

from dataclasses import dataclass

import torch
from torch.autograd import forward_ad

from . import eager, sdpa
from .call import Call

BACKENDS = ("reference", "eager", "sdpa")


@dataclass(frozen=True, slots=True)
class Facts:
    """All that the choice depends on.

    Args:
        kinds: kinds of the terms. device: its type. traced: torch.compile, export, a trace, forward
            mode or a torch.func transform is on. mask_grad: the mask wants a gradient.
    """

    kinds: frozenset[str]
    device: str
    traced: bool
    mask_grad: bool

    @classmethod
    def of(cls, call: Call) -> "Facts":
        return cls(
            kinds=frozenset(term.kind for term in call.terms),
            device=call.q.device.type,
            traced=torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0,
            mask_grad=call.mask is not None and call.mask.requires_grad,
        )


def obstacle(backend: str, facts: Facts) -> str | None:
    """Why a backend cannot compute such a call; None if it can."""
    if backend == "eager":
        if facts.traced:
            return "its written-out backward cannot be traced or transformed"
        if facts.mask_grad:
            return "it gives no gradient to the mask"
        return eager.unsupported(facts.kinds)
    if backend == "sdpa":
        return sdpa.unsupported(facts.kinds)
    return None


def choose(facts: Facts) -> tuple[str, list[str]]:
    """The backend that ``auto`` picks, and why, a line for each backend looked at."""
    reasons: list[str] = []
    if not facts.kinds:
        return "sdpa", ["sdpa: no terms, so this is plain attention"]
    for backend, wins in _preference(facts):
        problem = obstacle(backend, facts)
        if problem is None:
            return backend, [*reasons, f"{backend}: {wins}"]
        reasons.append(f"not {backend}: {problem}")
    raise AssertionError("the reference computes every call")


def _preference(facts: Facts) -> list[tuple[str, str]]:
    reference = ("reference", "plain torch, computes everything")
    fewest = ("eager", "fewest passes over the logits, measured fastest on a CPU")
    fused = ("sdpa", "torch's fused kernel takes the terms as one bias (predicted, not measured)")
    if facts.traced:
        return [("reference", "plain operations, which a compiler fuses and an exporter knows")]
    if facts.device == "cuda":
        return [fused, ("eager", "least memory of the ways that compute a value term"), reference]
    return [fewest, reference]
