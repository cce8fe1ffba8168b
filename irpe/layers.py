"""Multi-head self-attention with a position encoding, for your own transformer."""

import torch
from torch import Tensor, nn

from .backends import check_backend
from .encodings import build, encodings_of, parse
from .errors import IrpeError
from .functional import attention
from .geometry import Geometry
from .spec import LayerSize, Spec


class RPEAttention(nn.Module):
    """Multi-head self-attention with an encoding.

    Args:
        dim: C, number of channels of the tokens.
        num_heads: H, a divisor of C.
        rpe: spec of the encoding, or None for plain attention.
        prefix: number of prefix tokens (class token, registers) before the others.
        causal: whether the attention is causal.
        axes: number of axes of image (2) or video (3) positions; not used for texts.
        qkv_bias: whether the qkv projection has a bias.
        attn_drop: dropout probability of the attention probabilities.
        proj_drop: dropout probability of the output.
        backend: see ``irpe.attention``.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        IrpeError: if sizes do not match, or the encoding is added at a model's input.

    Example::

        layer = irpe.RPEAttention(384, 6, "rpe-2.0-product-ctx-1-k", prefix=1)
        x = layer(x, irpe.Grid(14, 14, prefix=1))      # [B, 197, 384] -> [B, 197, 384]

        layer = irpe.RPEAttention(384, 6, "rope", causal=True)
        x = layer(x, irpe.Sequence(512))
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        rpe: str | Spec | None = None,
        *,
        prefix: int = 0,
        causal: bool = False,
        axes: int = 2,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        head_dim = LayerSize.split(dim, num_heads)
        if not 0.0 <= attn_drop <= 1.0:
            raise IrpeError(f"attn_drop={attn_drop!r} is not a probability")
        self.num_heads, self.head_dim, self.causal = num_heads, head_dim, causal
        self.backend = check_backend(backend)
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
                "build it with irpe.build, and call its embed(x, geometry)"
            )
        encodings = build(
            spec,
            dim=dim,
            num_heads=num_heads,
            prefix=prefix,
            causal=causal,
            axes=axes,
            device=device,
            dtype=dtype,
        )
        for name, encoding in encodings.items():
            setattr(self, name, encoding)

    def forward(
        self, x: Tensor, geometry: Geometry | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Compute the attention of a batch of tokens.

        Args:
            x: ``[B, L, C]``.
            geometry: positions of the L tokens, such as ``irpe.Grid(14, 14, prefix=1)``.
            mask: see ``irpe.attention``.

        Returns:
            ``[B, L, C]``.

        Raises:
            IrpeError: if x or the geometry does not fit.
        """
        if not isinstance(geometry, Geometry):
            raise IrpeError(f"geometry={geometry!r}: pass the grid, as irpe.Grid(14, 14, prefix=1)")
        if x.dim() != 3 or x.shape[2] != self.qkv.in_features:
            raise IrpeError(f"x is [B, L, {self.qkv.in_features}], not {list(x.shape)}")
        encodings = encodings_of(self)
        q, k, v = self._projected(x, *encodings.inputs(x, x, geometry))
        q, k = encodings.transform(q, k, geometry)
        x = attention(
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
        """Return q, k and v ``[B, H, L, D]`` of inputs that may differ."""
        if xq is x and xk is x:
            parts = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
            return parts.permute(2, 0, 3, 1, 4).unbind(0)
        if not isinstance(self.qkv.weight, Tensor):  # quantised: the weight cannot be split
            made = (self.qkv(y).chunk(3, -1)[n] for n, y in enumerate((xq, xk, x)))
            return tuple(y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in made)
        weights = self.qkv.weight.chunk(3)
        biases = (None,) * 3 if self.qkv.bias is None else self.qkv.bias.chunk(3)
        return tuple(
            nn.functional.linear(y, w, b).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for y, w, b in zip((xq, xk, x), weights, biases, strict=True)
        )
