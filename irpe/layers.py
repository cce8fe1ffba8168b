"""Multi-head self-attention with a position encoding, for a transformer of your own."""

from numbers import Integral

import torch
from torch import Tensor, nn

from . import functional
from .encodings import build, hooks
from .errors import IrpeError
from .geometry import Geometry
from .spec import Spec, parse


class RPEAttention(nn.Module):
    """Self-attention over tokens whose positions are known.

    Args:
        dim: C, channels of the tokens. num_heads: H, divides C.
        rpe: an encoding's spec, or None for plain attention.
        prefix: whether prefix tokens (class token, registers) stand before the others.
        qkv_bias: bias in the qkv projection.
        attn_drop: dropout on the attention probabilities. proj_drop: on the output.
        backend: see ``irpe.attention``.
        causal: whether a query sees no later token.

    Example::

        layer = irpe.RPEAttention(dim=384, num_heads=6, rpe="rpe-2.0-product-ctx-1-k", prefix=True)
        x = layer(x, irpe.Grid(14, 14, prefix=1))      # [B, 197, 384] -> [B, 197, 384]

        layer = irpe.RPEAttention(dim=384, num_heads=6, rpe="rope", prefix=False, causal=True)
        x = layer(x, irpe.Sequence(512))
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        rpe: str | Spec | None = None,
        prefix: bool = True,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_heads", num_heads)):
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise IrpeError(f"{name}={value!r} is not a positive integer")
        if dim % num_heads:
            raise IrpeError(f"dim={dim} is no multiple of num_heads={num_heads}")
        if not 0.0 <= attn_drop <= 1.0:
            raise IrpeError(f"attn_drop={attn_drop!r} is not a probability")
        self.num_heads, self.head_dim, self.causal = num_heads, dim // num_heads, causal
        self.backend = functional.check_backend(backend)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.rpe_q = self.rpe_k = self.rpe_v = None
        if rpe is None:
            return
        spec = parse(rpe)
        if spec.at_input:
            raise IrpeError(
                f"{spec} is added at a model's input and not in its attention: "
                "irpe.build makes it, and its embed(x, geometry) adds it"
            )
        encodings = build(
            spec,
            dim=dim,
            num_heads=num_heads,
            prefix=prefix,
            causal=causal,
            device=device,
            dtype=dtype,
        )
        for name, encoding in encodings.items():
            setattr(self, name, encoding)

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
        encodings = hooks(self)
        q, k, v = self._projected(x, *encodings.inputs(x, x, geometry))
        q, k = encodings.transform(q, k, geometry)
        x = functional.attention(
            q,
            k,
            v,
            encodings.terms(geometry),
            mask=mask,
            is_causal=self.causal,
            dropout_p=self.attn_drop if self.training else 0.0,
            scale=self.head_dim**-0.5,
            backend=self.backend,
        )
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))

    def _projected(self, x: Tensor, xq: Tensor, xk: Tensor) -> tuple[Tensor, ...]:
        """q, k and v ``[B, H, L, D]``, of inputs that may differ."""
        if xq is x and xk is x:
            parts = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
            return parts.permute(2, 0, 3, 1, 4).unbind(0)
        if not isinstance(self.qkv.weight, Tensor):  # quantised: it does not come in parts
            made = (self.qkv(y).chunk(3, -1)[n] for n, y in enumerate((xq, xk, x)))
            return tuple(y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in made)
        weights = self.qkv.weight.chunk(3)
        biases = (None,) * 3 if self.qkv.bias is None else self.qkv.bias.chunk(3)
        return tuple(
            nn.functional.linear(y, w, b).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for y, w, b in zip((xq, xk, x), weights, biases, strict=True)
        )
