"""Self-attention over text with a cache of earlier tokens.

Shapes: B texts, L new tokens, S tokens with those in the cache, C channels, H heads of D.
"""

import torch
from torch import Tensor, nn

import irpe

from .cache import Kept


class Attention(nn.Module):
    """Multi-head self-attention with position encodings as attributes.

    Args:
        dim: C.
        num_heads: H, a divisor of C.
        causal: whether the attention is causal.
        drop: dropout probability of the attention probabilities.
        backend: see ``irpe.attention``.

    Raises:
        irpe.IrpeError: if ``num_heads`` does not divide ``dim``.
    """

    def __init__(
        self, dim: int, num_heads: int, causal: bool, drop: float = 0.0, backend: str = "auto"
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise irpe.IrpeError(f"dim={dim} is not a multiple of num_heads={num_heads}")
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.causal, self.drop, self.backend = causal, drop, backend
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        here: irpe.Geometry,
        seen: irpe.Geometry,
        past: Kept | None = None,
        mask: Tensor | None = None,
        terms: tuple[irpe.Term, ...] = (),
    ) -> tuple[Tensor, Kept]:
        """Compute the attention of new tokens.

        Args:
            x: new tokens ``[B, L, C]``.
            here: their positions.
            seen: geometry with x as queries and all S tokens as keys, those of ``past`` first.
            past: the cache; None: empty.
            mask: see ``irpe.attention``.
            terms: terms of an encoding that all layers share.

        Returns:
            ``[B, L, C]``, and the cache of all S tokens.
        """
        encodings = irpe.encodings_of(self)
        # Project the keys of all tokens, or only those of x if the others are cached.
        project = past is None or past.inputs is not None
        source, where = x, here
        if past is not None and project:
            source, where = torch.cat((past.inputs, x), 1), seen
        q, k, v = self._projected(x, source)
        if not encodings.by_length:
            q, k = encodings.transform(q, k, where)
        q, waves = self._infused(q, where)
        if not project:
            k, v = torch.cat((past.k, k), 2), torch.cat((past.v, v), 2)
            waves = None if waves is None else _joined(past.waves, waves)
        raw = k
        if encodings.by_length:
            q, k = encodings.transform(q, k, seen)
        out = irpe.attention(
            q,
            k if waves is None else k + waves,
            v,
            encodings.terms(seen) + terms,
            mask=mask,
            is_causal=self.causal,
            dropout_p=self.drop if self.training else 0.0,
            scale=self.head_dim**-0.5,
            backend=self.backend,
        )
        if project and torch.is_grad_enabled():
            kept = Kept(inputs=source.detach())
        else:
            kept = Kept(None, raw.detach(), v.detach(), None if waves is None else waves.detach())
        return self.proj(out.transpose(1, 2).flatten(2)), kept

    def _projected(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries of x, and keys and values of a source that ends with x."""
        if source is x:
            q, k, v = self.qkv(x).chunk(3, -1)
        else:
            dim = x.shape[-1]
            weight, bias = self.qkv.weight, self.qkv.bias
            q = nn.functional.linear(x, weight[:dim], bias[:dim])
            k, v = nn.functional.linear(source, weight[dim:], bias[dim:]).chunk(2, -1)
        return self._heads(q), self._heads(k), self._heads(v)

    def _infused(self, q: Tensor, where: irpe.Geometry) -> tuple[Tensor, Tensor | None]:
        """Return queries with sinusoids, and the position part of keys, for ``pia``.

        A projection is linear, Wk (y + p) = Wk y + Wk p, so a cache stores Wk y and adds Wk p of
        new positions.
        """
        pia = getattr(self, "pia", None)
        if pia is None:
            return q, None
        (wave_q, wave_k), weight = pia.waves(where, q), self.qkv.weight
        dim = wave_q.shape[-1]
        if wave_k is wave_q:
            on_q, on_k = nn.functional.linear(wave_q, weight[: 2 * dim]).chunk(2, -1)
        else:
            on_q = nn.functional.linear(wave_q, weight[:dim])
            on_k = nn.functional.linear(wave_k, weight[dim : 2 * dim])
        return q + self._heads(on_q), self._heads(on_k)

    def _heads(self, x: Tensor) -> Tensor:
        """Return ``[B, L, C]`` or ``[L, C]`` as ``[B | 1, H, L, D]``."""
        x = x if x.dim() == 3 else x.unsqueeze(0)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """Concatenate two tensors ``[1 | B, H, S, D]`` along S."""
    size = max(first.shape[0], second.shape[0])
    parts = (part.expand(size, -1, -1, -1) for part in (first, second))
    return torch.cat(list(parts), 2)
