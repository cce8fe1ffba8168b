"""DETR's transformer, with encodings in the self-attention of the encoder.

Shapes: B images, C channels, H x W the feature map, L = H W its tokens, Q object queries.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import irpe

from .attention import MultiheadAttention

Spec = irpe.Spec | str | None


class Transformer(nn.Module):
    """Encoder over the feature map, decoder over object queries.

    Args:
        d_model: C.
        nhead: number of heads, a divisor of C.
        num_encoder_layers: number of encoder layers.
        num_decoder_layers: number of decoder layers.
        dim_feedforward: hidden channels of the feed-forward layers.
        dropout: dropout probability.
        normalize_before: whether norms are before attention and feed-forward (pre-norm).
        return_intermediate_dec: whether to return the outputs of all decoder layers.
        enc_rpe2d: spec of the encoder's encoding, as ``"rpe-2.0-product-ctx-1-k"``, or a sequence
            with one for each layer; None or "": no encoding.
        dec_rpe2d: must be None, since object queries have no positions.
        cross_rpe2d: likewise.
        backend: see ``irpe.attention``; for layers with an encoding.

    Raises:
        irpe.IrpeError: if a spec is invalid or not supported, or the number of specs is not that of
            the layers.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        normalize_before: bool = False,
        return_intermediate_dec: bool = False,
        enc_rpe2d: Spec | Sequence[Spec] = None,
        *,
        dec_rpe2d: Spec = None,
        cross_rpe2d: Spec = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, spec, part in (
            ("dec_rpe2d", dec_rpe2d, "the decoder's self-attention"),
            ("cross_rpe2d", cross_rpe2d, "cross-attention"),
        ):
            if spec:
                raise irpe.IrpeError(
                    f"{name}={str(spec)!r}: {part} cannot have an image encoding, since object "
                    "queries have no positions; enc_rpe2d is for the encoder"
                )
        specs = _by_layer(enc_rpe2d, num_encoder_layers)
        self.d_model, self.nhead = d_model, nhead
        shared = (d_model, nhead, dim_feedforward, dropout, normalize_before)
        self.encoder = Encoder(
            [EncoderLayer(*shared, rpe=spec, backend=backend) for spec in specs],
            nn.LayerNorm(d_model) if normalize_before else None,
        )
        self.decoder = Decoder(
            [DecoderLayer(*shared) for _ in range(num_decoder_layers)],
            nn.LayerNorm(d_model),
            return_intermediate_dec,
        )
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and "lookup_table" not in name:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self, src: Tensor, mask: Tensor | None, query_embed: Tensor, pos_embed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute hidden states of object queries.

        Args:
            src: features ``[B, C, H, W]``.
            mask: bool ``[B, H, W]``, True for padding.
            query_embed: ``[Q, C]``.
            pos_embed: absolute positions ``[B, C, H, W]``.

        Returns:
            hs ``[layers, B, Q, C]`` (one layer without return_intermediate_dec) and memory
            ``[B, C, H, W]``.
        """
        B, _, height, width = src.shape
        x, pos = src.flatten(2).transpose(1, 2), pos_embed.flatten(2).transpose(1, 2)
        seen = None if mask is None else ~mask.flatten(1)
        memory = self.encoder(x, pos, seen, irpe.Grid(height, width))
        queries = query_embed.expand(B, -1, -1)
        hs = self.decoder(torch.zeros_like(queries), memory, pos, queries, seen)
        return hs, memory.transpose(1, 2).unflatten(2, (height, width))


class FeedForward(nn.Module):
    """Base of encoder and decoder layers: two linear layers, norms and dropouts."""

    def __init__(self, dim: int, hidden: int, dropout: float, norms: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)
        for number in range(1, norms + 1):
            self.add_module(f"norm{number}", nn.LayerNorm(dim))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(nn.functional.relu(self.linear1(x))))


class EncoderLayer(FeedForward):
    """Self-attention over the feature map, with absolute positions added to queries and keys."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        dropout: float,
        normalize_before: bool,
        rpe: Spec,
        backend: str,
    ) -> None:
        super().__init__(dim, hidden, dropout, norms=2)
        self.self_attn = MultiheadAttention(dim, num_heads, dropout, rpe, backend)
        self.normalize_before = normalize_before

    def forward(self, x: Tensor, pos: Tensor, seen: Tensor | None, grid: irpe.Grid) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            placed = x + pos
            return self.dropout(self.self_attn(placed, placed, x, seen, grid))

        if self.normalize_before:
            x = x + attend(self.norm1(x))
            return x + self.dropout(self.feed_forward(self.norm2(x)))
        x = self.norm1(x + attend(x))
        return self.norm2(x + self.dropout(self.feed_forward(x)))


class Encoder(nn.Module):
    """A stack of layers, with a final norm if they are pre-norm."""

    def __init__(self, layers: list[EncoderLayer], norm: nn.Module | None) -> None:
        super().__init__()
        self.layers, self.norm = nn.ModuleList(layers), norm

    def forward(self, x: Tensor, pos: Tensor, seen: Tensor | None, grid: irpe.Grid) -> Tensor:
        for layer in self.layers:
            x = layer(x, pos, seen, grid)
        return x if self.norm is None else self.norm(x)


class DecoderLayer(FeedForward):
    """Self-attention of object queries, then cross-attention to the feature map."""

    def __init__(
        self, dim: int, num_heads: int, hidden: int, dropout: float, normalize_before: bool
    ) -> None:
        super().__init__(dim, hidden, dropout, norms=3)
        self.self_attn = MultiheadAttention(dim, num_heads, dropout)
        self.multihead_attn = MultiheadAttention(dim, num_heads, dropout)
        self.normalize_before = normalize_before

    def forward(
        self, x: Tensor, memory: Tensor, pos: Tensor, queries: Tensor, seen: Tensor | None
    ) -> Tensor:
        def among(x: Tensor) -> Tensor:
            placed = x + queries
            return self.dropout(self.self_attn(placed, placed, x))

        def across(x: Tensor) -> Tensor:
            return self.dropout(self.multihead_attn(x + queries, memory + pos, memory, seen))

        if self.normalize_before:
            x = x + among(self.norm1(x))
            x = x + across(self.norm2(x))
            return x + self.dropout(self.feed_forward(self.norm3(x)))
        x = self.norm1(x + among(x))
        x = self.norm2(x + across(x))
        return self.norm3(x + self.dropout(self.feed_forward(x)))


class Decoder(nn.Module):
    """A stack of layers; the same norm is applied to each output."""

    def __init__(self, layers: list[DecoderLayer], norm: nn.Module, intermediate: bool) -> None:
        super().__init__()
        self.layers, self.norm, self.intermediate = nn.ModuleList(layers), norm, intermediate

    def forward(
        self, x: Tensor, memory: Tensor, pos: Tensor, queries: Tensor, seen: Tensor | None
    ) -> Tensor:
        outputs = []
        for layer in self.layers:
            x = layer(x, memory, pos, queries, seen)
            outputs.append(x)
        kept = outputs if self.intermediate else outputs[-1:]
        return torch.stack([self.norm(x) for x in kept])


def _by_layer(spec: Spec | Sequence[Spec], layers: int) -> list[irpe.Spec | None]:
    if spec is None or isinstance(spec, str | irpe.Spec):
        return [irpe.parse(spec) if spec else None] * layers
    specs = [irpe.parse(s) if s else None for s in spec]
    if len(specs) != layers:
        raise irpe.IrpeError(
            f"enc_rpe2d has {len(specs)} specs, but the encoder {layers} layers: "
            "give one for each, or one for all"
        )
    return specs
