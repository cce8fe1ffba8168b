"""Attention with position terms, and the gather it is built from.

Shapes: B batch, H heads, L queries, S keys, D head dim, N buckets.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .backends import eager, reference, sdpa, triton
from .backends.call import Call, autocasting, check_ids, debugging, transformed, without_autocast
from .backends.choose import BACKENDS, Facts, choose, obstacle
from .backends.triton import lookup as fused_lookup
from .errors import IrpeError
from .linear import LinearState, linear_attention, linear_step
from .terms import Term

__all__ = [
    "LinearState",
    "attention",
    "check_backend",
    "explain",
    "linear_attention",
    "linear_step",
    "lookup",
]

_RUN: dict[str, Callable[[Call], Tensor]] = {
    "reference": reference.attention,
    "eager": eager.attention,
    "sdpa": sdpa.attention,
    "triton": triton.attention,
}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: tuple[Term, ...] = (),
    mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale q k^T + terms) v, with any set of position terms.

    Args:
        q: ``[B, H, L, D]``, not scaled.
        k, v: ``[B, H | G, S, D]``; with G heads, each serves H / G consecutive heads of q.
        terms: what encodings' ``terms(geometry)`` return; add the tuples up.
        mask: broadcastable to ``[B, H, L, S]``; bool (True: seen; key padding is
            ``[B, 1, 1, S]``) or floating point, added to the logits.
        is_causal: query i sees the keys j <= i + S - L. May be combined with ``mask``.
        dropout_p: probability that an attention probability is dropped, before the value term.
        scale: D ** -0.5 if None.
        backend: ``reference``, ``eager``, ``sdpa``, ``triton`` (a GPU), or ``auto``, whose choice
            ``irpe.explain`` prints. A named backend computes the call or raises.

    Returns:
        ``[B, H, L, D]`` of q's dtype. A query that sees no key gives 0, and zero gradients.

    Raises:
        IrpeError: for shapes, dtypes, devices or terms that do not fit together, an unknown
            backend, or one that cannot do a term.
    """
    call = validated(q, k, v, terms, mask, is_causal, dropout_p, scale)
    facts = Facts.of(call)
    name = _resolve(backend, facts)
    with without_autocast(q.device.type):
        return _RUN[name](call)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: tuple[Term, ...] = (),
    mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> str:
    """Which backend ``auto`` takes for a call of ``irpe.attention``, and why; text to print."""
    call = validated(q, k, v, terms, mask, is_causal, dropout_p, scale)
    return reasoned(call, Facts.of(call), str(q.device))


def reasoned(call: Call, facts: Facts, device: str) -> str:
    """What ``explain`` says of a call, for facts that may be those of another device."""
    name, reasons = choose(facts)
    kinds = ", ".join(f"{t.kind} {list(t.table.shape)}" for t in call.terms) or "none"
    head = f"backend {name}: q {list(call.q.shape)} {call.q.dtype} on {device}, terms: {kinds}"
    return "\n  ".join([head, *reasons])


def lookup(x: Tensor, ids: Tensor) -> Tensor:
    """The gather alone: ``y[b, h, i, j] = x[b, h, i, ids[i, j]]``.

    On a GPU it is a Triton operator for bfloat16, float16 and float32, whose gradient is summed in
    float32 without atomics, to the same bits in every run; elsewhere, for other dtypes and in an
    exported or transformed graph it is torch's gather.

    Args:
        x: ``[B, H, L, N]``, a number for each query and bucket; any dtype and strides.
        ids: integer ``[L, S]`` or ``[B, L, S]``, in [0, N); any strides.

    Returns:
        ``[B, H, L, S]`` of x's dtype, also under autocast; differentiable in x to any order.

    Raises:
        IrpeError: for types, devices or shapes that do not fit together; and, if the environment
            has ``IRPE_DEBUG=1`` (read at every call; a GPU then waits for the check), for an id out
            of [0, N), with its value and place. Without it, torch raises an IndexError or a
            RuntimeError for such an id on a CPU; on a GPU the result is undefined. The check needs
            ids that have values: torch.compile skips it on a CPU, and exports, traces and
            torch.func transforms skip it everywhere.
    """
    if not isinstance(x, Tensor) or not isinstance(ids, Tensor):
        raise IrpeError(f"lookup takes tensors x and ids, not {_named(x)} and {_named(ids)}")
    if x.device != ids.device:
        raise IrpeError(f"lookup: x is on {x.device}, but ids on {ids.device}")
    if x.dim() != 4 or ids.dim() not in (2, 3):
        raise IrpeError(
            f"lookup takes x [B, H, L, N] and ids [L, S] or [B, L, S], "
            f"not {list(x.shape)} and {list(ids.shape)}"
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise IrpeError(f"ids are integers, not {ids.dtype}")
    if ids.shape[-2] != x.shape[-2] or (ids.dim() == 3 and ids.shape[0] not in (1, x.shape[0])):
        raise IrpeError(f"ids {list(ids.shape)} do not match x {list(x.shape)}")
    if fused_lookup.able(x):
        return fused_lookup.lookup(x, ids)
    if not (transformed() or torch.compiler.is_compiling() or ids.is_meta) and debugging():
        check_ids(ids, x.shape[-1])
    return reference.lookup(x, ids.to(torch.int64))


def check_backend(backend: str) -> str:
    """The name of a backend, or "auto"; raises IrpeError for any other."""
    if not isinstance(backend, str) or backend not in ("auto", *BACKENDS):
        valid = ", ".join(("auto", *BACKENDS))
        raise IrpeError(f"unknown backend {backend!r}: it is one of {valid}")
    return backend


def _resolve(backend: str, facts: Facts) -> str:
    if check_backend(backend) == "auto":
        return choose(facts)[0]
    problem = obstacle(backend, facts)
    if problem is not None:
        able = [name for name in BACKENDS if obstacle(name, facts) is None]
        raise IrpeError(
            f"backend {backend!r} cannot compute this call: {problem}. Able: {', '.join(able)}"
        )
    return backend


def validated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: tuple[Term, ...],
    mask: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    scale: float | None,
) -> Call:
    """The call, its arguments checked; raises what ``attention`` raises."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise IrpeError(f"{name} is a tensor [B, H, L, D], not {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise IrpeError(f"{name} is of floating point, not {tensor.dtype}")
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise IrpeError(f"q, k and v are [B, H, L, D], not {shapes}")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise IrpeError(f"q [B, H, L, D], k and v [B, H, S, D] do not fit together: {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise IrpeError(
            f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads: {shapes}"
        )
    if not isinstance(dropout_p, int | float) or not 0.0 <= dropout_p <= 1.0:
        raise IrpeError(f"dropout_p={dropout_p!r} is not a probability")
    if not isinstance(scale, int | float | torch.SymFloat | None):
        raise IrpeError(f"scale={scale!r} is not a number")
    if not isinstance(terms, tuple | list) or not all(isinstance(t, Term) for t in terms):
        raise IrpeError(
            f"terms are a tuple, as an encoding's terms(geometry) returns; not {_named(terms)}"
        )
    dtype = q.dtype
    if autocasting(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        terms = tuple(
            t if t.kind == "slope" else Term(t.kind, t.table.to(dtype), t.buckets) for t in terms
        )
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != dtype or tensor.device != q.device:
            raise IrpeError(
                f"q is {q.dtype} on {q.device}, but {name} {tensor.dtype} on {tensor.device}"
            )
    for term in terms:
        _check_term(term, q, k, v)
    if mask is not None:
        _check_mask(mask, q, k)
    if scale is None:
        scale = q.shape[3] ** -0.5
    return Call(q, k, v, tuple(terms), mask, is_causal, dropout_p, scale)


def _check_term(term: Term, q: Tensor, k: Tensor, v: Tensor) -> None:
    name, table, buckets = f"the {term.kind} table", term.table, term.buckets
    fits = table.is_floating_point() if term.kind == "slope" else table.dtype == q.dtype
    if not fits or table.device != q.device:
        raise IrpeError(
            f"{name} is {table.dtype} on {table.device}, but q is {q.dtype} on {q.device}: "
            f"move the module with .to() or use autocast"
        )
    H, D, N = q.shape[1], q.shape[3], buckets.size
    shape = {
        "query": (D, N), "key": (D, N), "channels": (D, N), "value": (N, v.shape[3]), "slope": (1,)
    }.get(term.kind, (N,))  # fmt: skip
    if table.dim() != 1 + len(shape) or table.shape[0] not in (1, H) or table.shape[1:] != shape:
        wanted = ", ".join(str(n) for n in shape)
        raise IrpeError(
            f"{name} is {list(table.shape)}, but q {list(q.shape)} and {N} buckets "
            f"need [1, {wanted}] or [{H}, {wanted}]"
        )
    buckets.geometry.check(q.shape[0], q.shape[2], k.shape[2])


def _check_mask(mask: Tensor, q: Tensor, k: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise IrpeError(f"mask is a tensor, not {mask!r}")
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    sizes = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if mask.dim() > 4 or any(m not in (1, n) for m, n in zip(sizes, full, strict=True)):
        raise IrpeError(f"mask {list(mask.shape)} does not broadcast to [B, H, L, S] {list(full)}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise IrpeError(f"mask is bool (True: seen) or floating point (added), not {mask.dtype}")
    if mask.device != q.device:
        raise IrpeError(f"mask is on {mask.device}, but q on {q.device}")


def _named(value: object) -> str:
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {', '.join(type(v).__name__ for v in value)}"
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    return f"{type(value).__name__} {value!r}"
