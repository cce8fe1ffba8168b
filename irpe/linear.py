"""Linear attention with rotary positions (Su et al., 2021, Eq. 19), and its recurrent form.

Scaling one query, or all keys, does not change a ratio of sums. So each token's features are
divided by its largest one, and sums are relative to the largest key so far. Features below the
smallest float32 number then still have correct weights.

Shapes: B batch, H heads, L queries, S keys, D features, E channels of values.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends.call import check_shapes, without_autocast
from .encodings import Encoding
from .errors import IrpeError
from .geometry import Geometry

CHUNK = 64  # queries and keys computed pair by pair; earlier keys are summed


@dataclass(frozen=True, slots=True, eq=False)
class LinearState:
    """The sums of linear attention over the keys so far, divided by ``exp(scale)``.

    Args:
        top: sum of rotated features times values, ``[B, H, D, E]``, float32 or float64.
        bottom: sum of unrotated features, ``[B, H, D]``.
        scale: logarithm of the largest feature of all keys, ``[B, H]``; -inf without keys.
    """

    top: Tensor
    bottom: Tensor
    scale: Tensor


def elu_features(x: Tensor) -> Tensor:
    """Return elu(x) + 1, which is positive (Katharopoulos et al., 2020)."""
    return torch.where(x > 0, x + 1, x.clamp(max=0.0).exp())


def attention(
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
    """Compute linear attention, with features of queries and keys instead of a softmax.

    ``out_i = sum_j (R_i f(q_i)) . (R_j f(k_j)) v_j / sum_j f(q_i) . f(k_j)``. The denominator is
    not rotated, so that it is not close to zero. So weights may be negative, and their sum need not
    be 1. ``[L, S]`` is not materialised.

    Args:
        q: ``[B, H, L, D]``.
        k: ``[B, H | G, S, D]``.
        v: ``[B, H | G, S, E]``.
        rotary: a rotary encoding, as ``irpe.build("rope", ...)["rope"]``, built for the number of
            channels of the features. None: no positions.
        geometry: positions of the tokens; required with ``rotary``.
        is_causal: query i attends to the keys j <= i + S - L.
        seen: bool ``[B, S]``, False for padding.
        features: maps q and k to nonnegative features.

    Returns:
        ``[B, H, L, E]`` of q's dtype; sums are float32 or float64. The output of a fully masked
        query is 0.

    Raises:
        IrpeError: if shapes do not match.
    """
    _check(q, k, v, seen)
    with without_autocast(q.device.type):
        fq, fk, v, scale = _featured(q, k, v, seen, features)
        rq, rk = _rotated(fq, fk, rotary, geometry)
        if not is_causal:
            sums = _sums(fk, rk, v, scale)
            return _ratio(rq @ sums.top, fq @ sums.bottom.unsqueeze(-1)).to(q.dtype)
        state: LinearState | None = None
        early = k.shape[-2] - q.shape[-2]
        if early > 0:
            first = (x[:, :, :early] for x in (fk, rk, v, scale))
            state = _sums(*first)
            fk, rk, v, scale = (x[:, :, early:] for x in (fk, rk, v, scale))
        elif early < 0:  # the first queries are fully masked
            fk, rk, v = (F.pad(x, (0, 0, -early, 0)) for x in (fk, rk, v))
            scale = F.pad(scale, (-early, 0), value=-torch.inf)
        out, _ = _running(fq, rq, fk, rk, v, scale, state=state)
        return out.to(q.dtype)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LinearState | None = None,
    rotary: Encoding | None = None,
    geometry: Geometry | None = None,
    *,
    features: Callable[[Tensor], Tensor] = elu_features,
) -> tuple[Tensor, LinearState]:
    """Compute causal linear attention of the next tokens, after those in a state.

    Args:
        q: queries of the new tokens only, see ``attention``.
        k: likewise.
        v: likewise.
        state: state after the previous tokens; None: there are none.
        rotary: see ``attention``.
        geometry: positions of the new tokens, as
            ``irpe.Sequence(1, positions=torch.tensor([17]))``.
        features: see ``attention``.

    Returns:
        ``[B, H, L, E]``, and the new state. The given state is not changed.

    Raises:
        IrpeError: if shapes do not match.
    """
    _check(q, k, v, None)
    if q.shape[-2] != k.shape[-2]:
        raise IrpeError(
            f"a step takes as many keys as queries, not {k.shape[-2]} and {q.shape[-2]}"
        )
    with without_autocast(q.device.type):
        fq, fk, v, scale = _featured(q, k, v, None, features)
        if state is not None:
            wanted = ([*fk.shape[:2], fk.shape[-1], v.shape[-1]], [*fk.shape[:2], fk.shape[-1]])
            found = (list(state.top.shape), list(state.bottom.shape))
            if found != wanted:
                raise IrpeError(
                    f"the state has sums of {found[0]} and {found[1]}, but q {list(q.shape)} "
                    f"and v {list(v.shape)} need {wanted[0]} and {wanted[1]}"
                )
        rq, rk = _rotated(fq, fk, rotary, geometry)
        out, state = _running(fq, rq, fk, rk, v, scale, state=state)
        return out.to(q.dtype), state


def _running(*tensors: Tensor, state: LinearState | None) -> tuple[Tensor, LinearState]:
    """Compute causal attention of fq, rq, fk, rk, v ``[B, H, L, ...]`` and scale ``[B, H, L]``.

    Long texts are computed in pieces of CHUNK chunks.
    """
    outs = []
    for piece in zip(*(x.split(CHUNK * CHUNK, 2) for x in tensors), strict=True):
        out, state = _chunks(*piece, state=state)
        outs.append(out)
    assert state is not None
    return torch.cat(outs, 2), state


def _chunks(
    fq: Tensor,
    rq: Tensor,
    fk: Tensor,
    rk: Tensor,
    v: Tensor,
    scale: Tensor,
    *,
    state: LinearState | None,
) -> tuple[Tensor, LinearState]:
    """Compute causal attention by chunks, with the sums of all chunks before; L = S."""
    L = fq.shape[-2]
    size = max(min(CHUNK, L), 1)
    pad = -L % size
    fq, rq, fk, rk, v = (
        F.pad(x, (0, 0, 0, pad)).unflatten(-2, (-1, size)) for x in (fq, rq, fk, rk, v)
    )  # [B, H, chunks, C, ...]
    scale = F.pad(scale, (0, pad), value=-torch.inf).unflatten(-1, (-1, size))
    sums = _sums(fk, rk, v, scale)
    if state is None:
        top, bottom = (torch.zeros_like(x[:, :, 0]) for x in (sums.top, sums.bottom))
        state = LinearState(top, bottom, torch.full_like(sums.scale[:, :, 0], -torch.inf))
    sums = _running_sums(
        torch.cat((state.top.unsqueeze(2), sums.top), 2),
        torch.cat((state.bottom.unsqueeze(2), sums.bottom), 2),
        torch.cat((state.scale.unsqueeze(2), sums.scale), 2),
    )
    before = sums.scale[:, :, :-1].unsqueeze(-1)
    largest = scale.cummax(-1).values.maximum(before)  # of the visible keys
    weights = _causal(scale, largest)
    far = (before - _finite(largest)).exp().unsqueeze(-1)
    top = (rq @ rk.transpose(-2, -1) * weights) @ v + far * (rq @ sums.top[:, :, :-1])
    bottom = (fq @ fk.transpose(-2, -1) * weights).sum(-1, keepdim=True)
    out = _ratio(top, bottom + far * (fq @ sums.bottom[:, :, :-1].unsqueeze(-1)))
    last = LinearState(sums.top[:, :, -1], sums.bottom[:, :, -1], sums.scale[:, :, -1])
    return out.flatten(2, 3)[..., :L, :], last


def _sums(fk: Tensor, rk: Tensor, v: Tensor, scale: Tensor) -> LinearState:
    """Sum over keys ``[..., S, D]`` whose features were divided by ``exp(scale)`` ``[..., S]``."""
    largest = scale.amax(-1) if scale.shape[-1] else scale.new_full(scale.shape[:-1], -torch.inf)
    weights = (scale - _finite(largest).unsqueeze(-1)).exp().unsqueeze(-1)
    return LinearState((rk * weights).transpose(-2, -1) @ v, (fk * weights).sum(-2), largest)


def _running_sums(top: Tensor, bottom: Tensor, scale: Tensor) -> LinearState:
    """Return cumulative sums along axis 2, each with its own scale."""
    largest = scale.cummax(2).values
    weights = _causal(scale, largest)
    return LinearState((weights @ top.flatten(3)).view_as(top), weights @ bottom, largest)


def _causal(scale: Tensor, largest: Tensor) -> Tensor:
    """Return factors ``[..., L, L]`` of keys, relative to the largest scale of each query."""
    later = torch.ones(2 * largest.shape[-1:], dtype=torch.bool, device=scale.device).triu(1)
    relative = scale.unsqueeze(-2) - _finite(largest).unsqueeze(-1)
    return relative.masked_fill(later, -torch.inf).exp()


def _finite(scale: Tensor) -> Tensor:
    """Replace -inf by 0, so that differences are not NaN."""
    return scale.masked_fill(scale == -torch.inf, 0.0)


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    """Return top / bottom; 0 with finite gradients for fully masked queries."""
    empty = bottom == 0
    return (top / bottom.masked_fill(empty, 1.0)).masked_fill(empty, 0.0)


def _featured(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, features: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return features of q and k, v for H heads, and the scale ``[B, H, S]`` of k's features."""
    wide = torch.promote_types(q.dtype, torch.float32)
    fq, _ = _scaled(q.to(wide), features)
    fk, scale = _scaled(k.to(wide), features)
    v = v.to(wide)
    if seen is not None:
        scale = scale.masked_fill(~seen[:, None], -torch.inf)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        fk, v, scale = (x.repeat_interleave(groups, 1) for x in (fk, v, scale))
    return fq, fk, v, scale


def _scaled(x: Tensor, features: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return features ``[B, H, R, D]`` divided by each token's largest, and its log ``[B, H, R]``.

    The scale has no gradient, since the ratio does not depend on it.
    """
    if features is elu_features:
        logs = torch.where(x > 0, x.clamp(min=0.0).log1p(), x)
        largest = logs.detach().amax(-1, keepdim=True)
        return (logs - largest).exp(), largest.squeeze(-1)
    found = features(x)
    largest = found.detach().abs().amax(-1, keepdim=True)
    return found / largest.masked_fill(largest <= 0, 1.0), largest.log().squeeze(-1)


def _rotated(
    fq: Tensor, fk: Tensor, rotary: Encoding | None, geometry: Geometry | None
) -> tuple[Tensor, Tensor]:
    if rotary is None:
        return fq, fk
    if not isinstance(rotary, Encoding) or not isinstance(geometry, Geometry):
        raise IrpeError(
            f"rotary={rotary!r} with geometry={geometry!r}: pass an encoding, as "
            'irpe.build("rope", ...)["rope"], and the positions of the tokens'
        )
    rq, rk = rotary.transform(fq, fk, geometry)
    if rq.shape != fq.shape or rotary.terms(geometry):
        raise IrpeError(f"{rotary} does not rotate: linear attention takes rotary encodings only")
    return rq, rk


def _check(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> None:
    check_shapes(q, k, v)
    if seen is None:
        return
    if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
        raise IrpeError(f"seen is a bool tensor [B, S], False for padding, not {seen!r}")
    if seen.shape not in ((k.shape[0], k.shape[2]), (1, k.shape[2])):
        raise IrpeError(f"seen {list(seen.shape)} does not match [B, S] of k {list(k.shape)}")
