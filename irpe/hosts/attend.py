"""The attention of attached modules of every library: encodings, terms, probabilities."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import reference
from ..encodings import encodings_of
from ..functional import attention
from ..geometry import Geometry
from ..terms import Term


def attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: Geometry,
    *,
    scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    drop: Callable[[Tensor], Tensor] | None = None,
    need_weights: bool = False,
    native: tuple[Term, ...] = (),
) -> tuple[Tensor, Tensor | None]:
    """Compute attention with the encodings of a module.

    Args:
        module: one with encodings attached.
        q: ``[B, H, L, D]``, see ``irpe.attention``.
        k: ``[B, H, S, D]``.
        v: ``[B, H, S, D]``.
        geometry: the positions of queries and keys.
        scale: factor of the dot products.
        mask: see ``irpe.attention``.
        is_causal: see ``irpe.attention``.
        dropout_p: probability of attention dropout.
        drop: a function for attention dropout. The probabilities are then computed explicitly and
            passed through it, so that its hooks run, and ``dropout_p`` is not used.
        need_weights: whether to return the probabilities.
        native: terms of the module's native encoding, if it is fused.

    Returns:
        Output ``[B, H, L, D]``, and probabilities ``[B, H, L, S]`` after dropout or None.
    """
    encodings, owner = encodings_of(module), module.__dict__
    q, k = encodings.transform(q, k, geometry)
    terms = encodings.terms(geometry) + native
    given: dict[str, Any] = {"mask": mask, "is_causal": is_causal, "scale": scale}
    given["backend"], record, weights = owner["rpe_backend"], owner.get("rpe_record"), None
    if need_weights and dropout_p and drop is None:
        drop = partial(F.dropout, p=dropout_p)
    if need_weights or drop is not None or record is not None:
        # With the identity as values, the output of attention is its probabilities.
        eye = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
        weights = attention(q, k, eye, tuple(t for t in terms if t.kind != "value"), **given)
    if weights is not None and record is not None:
        record.append((weights, q, k, terms, scale))
    if weights is None or drop is None:
        out = attention(q, k, v, terms, dropout_p=dropout_p, **given)
    else:
        groups = weights.shape[1] // v.shape[1]
        weights = drop(weights)
        out = reference.weighted(weights, v.repeat_interleave(groups, dim=1), terms)
    return out, weights if need_weights else None
