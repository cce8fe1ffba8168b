"""Multi-head self-attention with relative position encoding, for a custom vision transformer."""

from numbers import Integral

import torch
from torch import Tensor, nn

from . import functional
from .encodings import build_rpe
from .encodings.base import collect_terms
from .errors import IrpeError
from .geometry import Geometry
from .spec import RPE, parse


class RPEAttention(nn.Module):
    """Self-attention over tokens whose positions are known.

    Args:
        dim: C, channels of the tokens. num_heads: H, divides C.
        rpe: an encoding's spec, or None for plain attention.
        prefix: whether prefix tokens (class token, registers) stand before the patches.
        qkv_bias: bias in the qkv projection.
        attn_drop: dropout on the attention probabilities. proj_drop: on the output.
        backend: see ``irpe.attention``.

    Example::

        layer = irpe.RPEAttention(dim=384, num_heads=6, rpe="rpe-2.0-product-ctx-1-k", prefix=True)
        x = layer(x, irpe.Grid(14, 14, prefix=1))      # [B, 197, 384] -> [B, 197, 384]
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        rpe: str | RPE | None = None,
        prefix: bool = True,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_heads", num_heads)):
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise IrpeError(f"{name}={value!r} is not a positive integer")
        if dim % num_heads:
            raise IrpeError(f"dim={dim} is no multiple of num_heads={num_heads}")
        if not 0.0 <= attn_drop <= 1.0:
            raise IrpeError(f"attn_drop={attn_drop!r} is not a probability")
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.backend = functional.check_backend(backend)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.rpe_q = self.rpe_k = self.rpe_v = None
        if rpe is not None:
            self.rpe_q, self.rpe_k, self.rpe_v = build_rpe(
                parse(rpe),
                head_dim=self.head_dim,
                num_heads=num_heads,
                prefix=prefix,
                device=device,
                dtype=dtype,
            )

    def forward(
        self, x: Tensor, geometry: Geometry | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            x: ``[B, L, C]``. geometry: where the L tokens are, as ``irpe.Grid(14, 14, prefix=1)``.
            mask: see ``irpe.attention``.

        Returns:
            ``[B, L, C]``.
        """
        if not isinstance(geometry, Geometry):
            raise IrpeError(f"geometry={geometry!r}: pass the grid, as irpe.Grid(14, 14, prefix=1)")
        if x.dim() != 3 or x.shape[2] != self.qkv.in_features:
            raise IrpeError(f"x is [B, L, {self.qkv.in_features}], not {list(x.shape)}")
        B, L, C = x.shape
        qkv = self.qkv(x).reshape(B, L, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = functional.attention(
            q,
            k,
            v,
            collect_terms(self, geometry),
            mask=mask,
            dropout_p=self.attn_drop if self.training else 0.0,
            backend=self.backend,
        )
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, L, C)))
