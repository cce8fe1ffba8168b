"""Which backend computes a call: a pure function of the call's facts, with its reasons."""

from dataclasses import dataclass

import torch

from . import sdpa, triton
from .call import Call, exporting, transformed

BACKENDS = ("reference", "eager", "sdpa", "triton")


@dataclass(frozen=True, slots=True)
class Facts:
    """All that the choice depends on.

    Args:
        kinds: kinds of the terms. gain_maps: bucket functions among the gain terms.
        device: its type. dtype: of q. head_dim: the wider of q's and v's. pairs: L * S.
        compiled: torch.compile is on. traced: export, a trace, forward mode or a torch.func
            transform is. mask_grad: the mask wants a gradient.
        no_triton: why Triton cannot run on q's device, None if it can.
    """

    kinds: frozenset[str]
    gain_maps: int
    device: str
    dtype: torch.dtype
    head_dim: int
    pairs: int
    compiled: bool
    traced: bool
    mask_grad: bool
    no_triton: str | None

    @classmethod
    def of(cls, call: Call) -> "Facts":
        q, v = call.q, call.v
        exported = exporting()
        gains = {(t.buckets.function, t.buckets.by_key) for t in call.terms if t.kind == "gain"}
        return cls(
            kinds=frozenset(term.kind for term in call.terms),
            gain_maps=len(gains),
            device=q.device.type,
            dtype=q.dtype,
            head_dim=max(q.shape[-1], v.shape[-1]),
            pairs=0 if exported or torch.jit.is_tracing() else q.shape[-2] * v.shape[-2],
            compiled=torch.compiler.is_compiling() and not exported,
            traced=transformed(),
            mask_grad=call.mask is not None and call.mask.requires_grad,
            no_triton=triton.absent(q.device),
        )


def obstacle(backend: str, facts: Facts) -> str | None:
    """Why a backend cannot compute such a call; None if it can."""
    if backend == "eager":
        if facts.traced or facts.compiled:
            return "its written-out backward cannot be traced or transformed"
        if facts.mask_grad:
            return "it gives no gradient to the mask"
        return None
    if backend == "sdpa":
        return sdpa.unsupported(facts.kinds)
    if backend == "triton":
        if facts.no_triton is not None:
            return facts.no_triton
        if facts.traced:
            return "an exported or transformed graph has plain operations only"
        if facts.mask_grad:
            return "it gives no gradient to the mask"
        return triton.unsupported(
            facts.kinds, facts.dtype, facts.head_dim, facts.pairs, facts.gain_maps
        )
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
    fused = ("triton", "one kernel each way, no bias in memory (predicted fastest, not measured)")
    biased = ("sdpa", "torch's fused kernel takes the terms as one bias (predicted, not measured)")
    traced = ("reference", "plain operations, which a compiler fuses and an exporter knows")
    if facts.traced:
        return [traced]
    if facts.device == "cuda":
        least = ("eager", "least memory of the ways that compute a value term")
        # In float32 the kernel does without tensor cores, and some of its variants spill.
        half = facts.dtype != torch.float32
        return [fused, biased, least, reference] if half else [biased, least, fused, reference]
    return [traced] if facts.compiled else [fewest, reference]
