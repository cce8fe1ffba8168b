"""Attention with position terms, and the gather of bucketed values.

Shapes: B batch, H heads, L queries, S keys, D head dim, N buckets.
"""

from typing import Any

import torch
from torch import Tensor

from .backends import KNOWN, Call, choose, named, reference
from .backends.call import (
    autocasting,
    check_ids,
    check_shapes,
    debugging,
    exporting,
    transformed,
    without_autocast,
)
from .backends.triton import lookup as fused_lookup
from .errors import IrpeError
from .terms import KINDS, Term

__all__ = ["attention", "explain", "lookup"]
MOST = 4096  # validated calls to remember


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: tuple[Term, ...] = (),
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute softmax(scale q k^T + terms) v, with any set of position terms.

    Args:
        q: ``[B, H, L, D]``, not scaled.
        k: ``[B, H | G, S, D]``; each of G heads is used by H / G consecutive heads of q.
        v: ``[B, H | G, S, E]``.
        terms: results of ``terms(geometry)`` of encodings; concatenate the tuples of several.
        mask: broadcastable to ``[B, H, L, S]``; bool (True: visible; key padding is
            ``[B, 1, 1, S]``) or floating point, added to the logits.
        is_causal: query i attends to the keys j <= i + S - L. May be combined with ``mask``.
        dropout_p: dropout probability of the attention probabilities, also in value terms.
        scale: factor of the dot products; None: D ** -0.5.
        backend: ``reference``, ``eager``, ``sdpa``, ``triton`` (on a GPU), a registered backend, or
            ``auto``. ``irpe.explain`` returns the selection of ``auto``.

    Returns:
        ``[B, H, L, E]`` of q's dtype. A fully masked query has output 0 and zero gradients.

    Raises:
        IrpeError: if shapes, dtypes, devices or terms do not match, or the backend is unknown or
            does not support the call.
    """
    key = _key(q, k, v, terms, mask, is_causal, dropout_p, scale, backend)
    try:
        known = None if key is None else KNOWN.get(key)
    except TypeError:  # an unhashable argument, such as a list
        key = known = None
    if key is not None and known is not None:  # validated before
        if key[1]:
            q, k, v = q.to(key[0]), k.to(key[0]), v.to(key[0])
        scale = q.shape[3] ** -0.5 if scale is None else scale
        call = Call(q, k, v, tuple(terms), mask, is_causal, dropout_p, scale, q.device, key=key)
        return known.attention(call)
    call = validated(q, k, v, terms, mask, is_causal, dropout_p, scale)
    chosen = named(backend, call)
    if chosen.planned:
        if key is not None:
            if len(KNOWN) >= MOST:
                KNOWN.clear()
            KNOWN[key] = chosen
        return chosen.attention(call)
    with without_autocast(q.device.type):
        return chosen.attention(call.cast())


def _key(
    q: Tensor, k: Tensor, v: Tensor, terms: tuple[Term, ...], mask: Tensor | None, is_causal: bool,
    dropout_p: float, scale: float | None, backend: str,
) -> tuple | None:  # fmt: skip
    """Return the key of a call, see ``Call.key``; its first item is the dtype of the computation.

    None if a graph is traced, or an argument has a wrong type.
    """
    if torch.compiler.is_compiling() or transformed():
        return None
    try:
        device, casting = q.device, _casting(q)
        own: list[Any] = []
        geometry, owner = None, None
        for term in terms:
            table, buckets = term.table, term.buckets
            if buckets.geometry is not geometry:
                geometry = buckets.geometry
                owner = geometry.owner()
            function = buckets.function if buckets.number is None else buckets.number
            own += (
                term.kind, table.shape, table.dtype, table.device, function, buckets.by_key, owner,
                table.requires_grad,
            )  # fmt: skip
        return (
            torch.get_autocast_dtype(device.type) if casting else q.dtype, casting, backend,
            q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, device, k.device, v.device,
            None if mask is None else (mask.shape, mask.dtype, mask.device, mask.requires_grad),
            is_causal, dropout_p, scale, *own,
        )  # fmt: skip
    except (AttributeError, TypeError):
        return None


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: tuple[Term, ...] = (),
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> str:
    """Return, as text, the backend that ``auto`` selects for a call, and the reasons.

    Arguments and errors are those of ``irpe.attention``.
    """
    return reasoned(validated(q, k, v, terms, mask, is_causal, dropout_p, scale))


def reasoned(call: Call) -> str:
    """Return the text of ``explain``; ``call.device`` may differ from the device of its tensors."""
    backend, reasons = choose(call)
    kinds = ", ".join(f"{t.kind} {list(t.table.shape)}" for t in call.terms) or "none"
    q = call.q
    head = f"backend {backend.name}: q {list(q.shape)} {q.dtype} on {call.device}, terms: {kinds}"
    return "\n  ".join([head, *reasons])


def lookup(x: Tensor, ids: Tensor) -> Tensor:
    """Return the gather ``y[b, h, i, j] = x[b, h, i, ids[i, j]]``.

    On a GPU it is a Triton operator for bfloat16, float16 and float32. Its gradient is summed in
    float32 without atomics, so it is deterministic. On other devices, for other dtypes and in
    exported or transformed graphs it is torch's gather.

    Ids outside [0, N) raise torch's IndexError or RuntimeError on a CPU; on a GPU the result is
    undefined. With ``IRPE_DEBUG=1`` in the environment, read at every call, they raise IrpeError
    with the value and index; on a GPU this check synchronises. torch.compile skips the check on a
    CPU; exports, traces and torch.func transforms always skip it.

    Args:
        x: ``[B, H, L, N]``, a number for each query and bucket; any dtype and strides.
        ids: integer ``[L, S]`` or ``[B, L, S]``, in [0, N); any strides.

    Returns:
        ``[B, H, L, S]`` of x's dtype, also under autocast; differentiable in x to any order.

    Raises:
        IrpeError: if types, devices or shapes do not match; with ``IRPE_DEBUG=1``, if an id is
            outside [0, N).
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
    """Return the validated call; raise the errors of ``attention``."""
    check_shapes(q, k, v)
    if not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p <= 1.0:
        raise IrpeError(f"dropout_p={dropout_p!r} is not a probability")
    if not isinstance(is_causal, bool | torch.SymBool):
        raise IrpeError(f"is_causal={is_causal!r} is not a bool")
    if not isinstance(scale, int | float | torch.SymFloat | None) or isinstance(scale, bool):
        raise IrpeError(f"scale={scale!r} is not a number")
    if not isinstance(terms, tuple | list) or not all(isinstance(t, Term) for t in terms):
        raise IrpeError(
            f"terms must be a tuple, such as an encoding's terms(geometry), not {_named(terms)}"
        )
    dtype, casting = q.dtype, _casting(q)
    if casting:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != dtype or tensor.device != q.device:
            raise IrpeError(
                f"q is {q.dtype} on {q.device}, but {name} {tensor.dtype} on {tensor.device}"
            )
    for term in terms:
        _check_term(term, q, k, v, casting)
    if mask is not None:
        _check_mask(mask, q, k)
    if scale is None:
        scale = q.shape[3] ** -0.5
    compiled = torch.compiler.is_compiling() and not exporting()
    more: dict[str, Any] = {"device": q.device, "compiled": compiled, "traced": transformed()}
    return Call(q, k, v, tuple(terms), mask, is_causal, dropout_p, scale, **more)


def _casting(q: Tensor) -> bool:
    """Return whether autocast is on and casts q: it leaves float64 unchanged."""
    return autocasting(q.device.type) and q.dtype != torch.float64


def _check_term(term: Term, q: Tensor, k: Tensor, v: Tensor, casting: bool) -> None:
    name, table = f"the {term.kind} table", term.table
    fits = casting or term.kind == "slope" or table.dtype == q.dtype
    if not fits or table.device != q.device:
        raise IrpeError(
            f"{name} is {table.dtype} on {table.device}, but q is {q.dtype} on {q.device}: "
            f"move the module with .to() or use autocast"
        )
    sizes = {"D": q.shape[3], "E": v.shape[3], "N": term.buckets.size, "1": 1}
    shape = tuple(sizes[axis] for axis in KINDS[term.kind].shape)
    if table.shape[0] not in (1, q.shape[1]) or table.shape[1:] != shape:
        wanted = ", ".join(str(n) for n in shape)
        raise IrpeError(
            f"{name} is {list(table.shape)}, but q {list(q.shape)} and {term.buckets.size} buckets "
            f"need [1, {wanted}] or [{q.shape[1]}, {wanted}]"
        )
    term.buckets.geometry.check(q.shape[0], q.shape[2], k.shape[2])


def _check_mask(mask: Tensor, q: Tensor, k: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise IrpeError(f"mask is a tensor, not {mask!r}")
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    sizes = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if mask.dim() > 4 or any(m not in (1, n) for m, n in zip(sizes, full, strict=True)):
        raise IrpeError(f"mask {list(mask.shape)} does not broadcast to [B, H, L, S] {list(full)}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise IrpeError(f"mask is bool (True: visible) or floating point (added), not {mask.dtype}")
    if mask.device != q.device:
        raise IrpeError(f"mask is on {mask.device}, but q on {q.device}")


def _named(value: object) -> str:
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {', '.join(type(v).__name__ for v in value)}"
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    return f"{type(value).__name__} {value!r}"
