"""Linear attention with rotary positions (Su et al., 2021, Eq. 19), and its recurrent form.

Shapes: B batch, H heads, L queries, S keys, D features, E channels of values.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends.call import without_autocast
from .encodings import Encoding
from .errors import IrpeError
from .geometry import Geometry

CHUNK = 64  # queries that meet their keys pair by pair; what lies before them is a sum


@dataclass(frozen=True, slots=True, eq=False)
class LinearState:
    """All that linear attention remembers of the keys so far.

    Args:
        top: sum of rotated features times values, ``[B, H, D, E]``, float32 or better.
        bottom: sum of features that are not rotated, ``[B, H, D]``.
    """

    top: Tensor
    bottom: Tensor


def elu_features(x: Tensor) -> Tensor:
    """elu(x) + 1, which is positive (Katharopoulos et al., 2020)."""
    return F.elu(x) + 1


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: Encoding | None = None,
    geometry: Geometry | None = None,
    *,
    is_causal: bool = False,
    seen: Tensor | None = None,
    features: Callable[[Tensor], Tensor] = elu_features,
) -> Tensor:
    """Attention in linear time: features of queries and keys in place of a softmax.

    ``out_i = sum_j (R_i f(q_i)) . (R_j f(k_j)) v_j / sum_j f(q_i) . f(k_j)``: the numerator is
    rotated, the denominator is not, lest it come close to zero. So weights may be negative, and
    their sum need not be 1. Nothing of size L * S is built.

    Args:
        q: ``[B, H, L, D]``. k, v: ``[B, H | G, S, D]`` and ``[B, H | G, S, E]``.
        rotary: a rotary encoding, as ``irpe.build("rope", ...)["rope"]``, built for as many
            channels as ``features`` returns. None: no positions.
        geometry: where the tokens are; needed with ``rotary``.
        is_causal: query i sees the keys j <= i + S - L.
        seen: bool ``[B, S]``, False for keys that are padding.
        features: what q and k become, nonnegative.

    Returns:
        ``[B, H, L, E]`` of q's dtype; sums are kept in float32 or better. A query that sees no
        key gives 0.

    Raises:
        IrpeError: for shapes that do not fit together.
    """
    _check(q, k, v, seen)
    with without_autocast(q.device.type):
        fq, fk, v = _featured(q, k, v, seen, features)
        rq, rk = _rotated(fq, fk, rotary, geometry)
        if not is_causal:
            top = rq @ (rk.transpose(-2, -1) @ v)
            bottom = fq @ fk.sum(-2).unsqueeze(-1)
            return _ratio(top, bottom).to(q.dtype)
        early = k.shape[-2] - q.shape[-2]
        state = None
        if early > 0:
            state = _sums(fk[..., :early, :], rk[..., :early, :], v[..., :early, :])
            fk, rk, v = (x[..., early:, :] for x in (fk, rk, v))
        elif early < 0:  # the first queries see nothing
            fk, rk, v = (F.pad(x, (0, 0, -early, 0)) for x in (fk, rk, v))
        out, _ = _running(fq, rq, fk, rk, v, state)
        return out.to(q.dtype)


def linear_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LinearState | None = None,
    rotary: Encoding | None = None,
    geometry: Geometry | None = None,
    *,
    features: Callable[[Tensor], Tensor] = elu_features,
) -> tuple[Tensor, LinearState]:
    """Causal linear attention of the next token, or the next few, after those in a state.

    Args:
        q, k, v: of the new tokens alone, see ``linear_attention``.
        state: what came before; None: nothing.
        geometry: positions of the new tokens, as
            ``irpe.Sequence(1, positions=torch.tensor([17]))``.

    Returns:
        ``[B, H, L, E]``, and the state after these tokens. The state given is not changed.
    """
    _check(q, k, v, None)
    if q.shape[-2] != k.shape[-2]:
        raise IrpeError(
            f"a step takes as many keys as queries, not {k.shape[-2]} and {q.shape[-2]}"
        )
    with without_autocast(q.device.type):
        fq, fk, v = _featured(q, k, v, None, features)
        if state is not None:
            wanted = ([*fk.shape[:2], fk.shape[-1], v.shape[-1]], [*fk.shape[:2], fk.shape[-1]])
            found = (list(state.top.shape), list(state.bottom.shape))
            if found != wanted:
                raise IrpeError(
                    f"the state holds sums of {found[0]} and {found[1]}, but q {list(q.shape)} "
                    f"and v {list(v.shape)} need {wanted[0]} and {wanted[1]}"
                )
        rq, rk = _rotated(fq, fk, rotary, geometry)
        out, state = _running(fq, rq, fk, rk, v, state)
        return out.to(q.dtype), state


def _running(
    fq: Tensor, rq: Tensor, fk: Tensor, rk: Tensor, v: Tensor, state: LinearState | None
) -> tuple[Tensor, LinearState]:
    """Causal attention chunk by chunk, with the sums of all chunks before; L = S."""
    L = fq.shape[-2]
    pad = -L % min(CHUNK, L) if L else 0
    fq, rq, fk, rk, v = (
        F.pad(x, (0, 0, 0, pad)).unflatten(-2, (-1, min(CHUNK, L))) for x in (fq, rq, fk, rk, v)
    )  # [B, H, chunks, C, ...]
    top, bottom = rk.transpose(-2, -1) @ v, fk.sum(-2)
    start = state or LinearState(torch.zeros_like(top[:, :, 0]), torch.zeros_like(bottom[:, :, 0]))
    tops = torch.cat((start.top.unsqueeze(2), top), 2).cumsum(2)
    bottoms = torch.cat((start.bottom.unsqueeze(2), bottom), 2).cumsum(2)
    near = (rq @ rk.transpose(-2, -1)).tril() @ v
    weight = (fq * fk.cumsum(-2)).sum(-1, keepdim=True)
    out = _ratio(near + rq @ tops[:, :, :-1], weight + fq @ bottoms[:, :, :-1].unsqueeze(-1))
    return out.flatten(2, 3)[..., :L, :], LinearState(tops[:, :, -1], bottoms[:, :, -1])


def _sums(fk: Tensor, rk: Tensor, v: Tensor) -> LinearState:
    return LinearState(rk.transpose(-2, -1) @ v, fk.sum(-2))


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    """0 where nothing is seen; gradients stay finite there."""
    empty = bottom == 0
    return (top / bottom.masked_fill(empty, 1.0)).masked_fill(empty, 0.0)


def _featured(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    features: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    fq, fk, v = features(q.to(wide)), features(k.to(wide)), v.to(wide)
    if seen is not None:
        fk = fk * seen[:, None, :, None]
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        fk, v = fk.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return fq, fk, v


def _rotated(
    fq: Tensor, fk: Tensor, rotary: Encoding | None, geometry: Geometry | None
) -> tuple[Tensor, Tensor]:
    if rotary is None:
        return fq, fk
    if not isinstance(rotary, Encoding) or not isinstance(geometry, Geometry):
        raise IrpeError(
            f"rotary={rotary!r} with geometry={geometry!r}: pass an encoding, as "
            'irpe.build("rope", ...)["rope"], and where the tokens are'
        )
    rq, rk = rotary.transform(fq, fk, geometry)
    if rq.shape != fq.shape or rotary.terms(geometry):
        raise IrpeError(f"{rotary} does not rotate: linear attention takes rotary encodings only")
    return rq, rk


def _check(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> None:
    if not all(isinstance(x, Tensor) and x.dim() == 4 for x in (q, k, v)):
        raise IrpeError("q, k and v are tensors [B, H, L, D]")
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise IrpeError(f"q [B, H, L, D], k and v [B, H, S, D] do not fit together: {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise IrpeError(
            f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads: {shapes}"
        )
    if seen is None:
        return
    if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
        raise IrpeError(f"seen is a bool tensor [B, S], True for keys that count, not {seen!r}")
    if seen.shape not in ((k.shape[0], k.shape[2]), (1, k.shape[2])):
        raise IrpeError(f"seen {list(seen.shape)} does not match [B, S] of k {list(k.shape)}")
