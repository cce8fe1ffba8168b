"""Multi-head attention on irpe, with the parameter names of ``nn.MultiheadAttention``."""

import torch
from torch import Tensor, nn

import irpe


class MultiheadAttention(nn.Module):
    """Attention with separate queries, keys and values, and an optional encoding.

    Args:
        dim: C, number of channels.
        num_heads: H, a divisor of C.
        dropout: dropout probability of the attention probabilities.
        rpe: spec of an encoding, or None for plain attention.
        backend: see ``irpe.attention``.

    Raises:
        irpe.IrpeError: if ``num_heads`` does not divide ``dim``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        dropout: float = 0.0,
        rpe: irpe.Spec | str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise irpe.IrpeError(f"dim={dim} is not a multiple of num_heads={num_heads}")
        self.num_heads, self.dropout, self.backend = num_heads, dropout, backend
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)
        made = {} if rpe is None else irpe.build(rpe, dim=dim, num_heads=num_heads)
        for name, encoding in made.items():
            setattr(self, name, encoding)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        seen: Tensor | None = None,
        geometry: irpe.Geometry | None = None,
    ) -> Tensor:
        """Compute the attention.

        Args:
            query: ``[B, L, C]``.
            key: ``[B, S, C]``.
            value: ``[B, S, C]``.
            seen: bool ``[B, S]``, False for padding.
            geometry: positions of the tokens, for an encoding.

        Returns:
            ``[B, L, C]``. For a fully masked query, the bias of the output projection.
        """
        encodings = irpe.encodings_of(self)
        query, key = encodings.inputs(query, key, geometry)
        weights = zip(
            (query, key, value),
            self.in_proj_weight.chunk(3),
            self.in_proj_bias.chunk(3),
            strict=True,
        )
        q, k, v = (
            nn.functional.linear(x, w, b).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, w, b in weights
        )
        q, k = encodings.transform(q, k, geometry)
        terms = encodings.terms(geometry)
        x = irpe.attention(
            q,
            k,
            v,
            terms,
            mask=None if seen is None else seen[:, None, None],
            dropout_p=self.dropout if self.training else 0.0,
            scale=(self.in_proj_weight.shape[1] // self.num_heads) ** -0.5,
            backend=self.backend if terms else "auto",
        )
        return self.out_proj(x.transpose(1, 2).flatten(2))
