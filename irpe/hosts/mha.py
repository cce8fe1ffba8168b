"""torch's ``nn.MultiheadAttention``, and what is built on it: ``nn.TransformerEncoder``, DETR.

Such a module does not know where its tokens are, so the caller says it, around the model's forward
pass: ``with irpe.located(grid):``. Queries and keys may carry absolute positions, values need not.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..encodings import build, hooks
from ..errors import IrpeError
from ..functional import attention
from ..spec import Spec
from ..terms import Term
from .place import here
from .site import Site, misplaced, put_on, take_off


def sites(model: nn.Module) -> Iterator[Site]:
    """The self-attentions of a model; those inside decoders are refused, pooling is passed over."""
    decoded: set[int] = set()
    pooling: set[int] = set()
    encoders: dict[int, nn.TransformerEncoder] = {}
    for module in model.modules():
        inside = {id(m) for m in module.modules() if isinstance(m, nn.MultiheadAttention)}
        if "decoder" in type(module).__name__.lower():  # torch's, DETR's and their kin
            decoded |= inside
        if type(module).__name__.lower().endswith(("pooler", "pooling", "poolinghead")):
            pooling |= inside  # a learned query has no place
        if isinstance(module, nn.TransformerEncoder):
            encoders |= dict.fromkeys(inside, module)
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and id(module) not in pooling:
            yield MhaSite(name, module, id(module) in decoded, encoders.get(id(module)))


class MhaSite(Site):
    """One module.

    Args:
        decoder: whether a decoder holds it. encoder: the ``nn.TransformerEncoder`` that does.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        decoder: bool = False,
        encoder: nn.TransformerEncoder | None = None,
    ) -> None:
        super().__init__(name, module)
        self.module: Any = module
        self.decoder, self.encoder = decoder, encoder

    @property
    def equipped(self) -> bool:
        return isinstance(self.module, EquippedMultiheadAttention)

    def obstacle(self, spec: Spec) -> str | None:
        module = self.module
        if type(module) is not nn.MultiheadAttention:
            return f"{type(module).__name__} computes its attention in its own way"
        if self.decoder:
            return (
                "it belongs to a decoder, whose queries have no place on the grid; "
                "choose the encoder with where="
            )
        if not module._qkv_same_embed_dim:
            return "its keys or values are of another width than its queries: no self-attention"
        if module.bias_k is not None or module.add_zero_attn:
            return "it adds a key without a place (add_bias_kv or add_zero_attn)"
        return misplaced(spec)

    @property
    def prefix(self) -> bool:
        """Whether prefix tokens stand before the others."""
        place = here()
        return place is not None and (place.prefix > 0 or place.key_prefix > 0)

    def equip(self, spec: Spec, backend: str) -> None:
        module, weight = self.module, self.module.in_proj_weight
        encodings = build(
            spec,
            dim=module.embed_dim,
            num_heads=module.num_heads,
            prefix=self.prefix,
            device=weight.device,
            dtype=weight.dtype,
        )
        module.__class__ = EquippedMultiheadAttention
        put_on(module, encodings)
        module.rpe_backend = backend
        # torch's encoder layers would go round forward() in evaluation, and so round the terms.
        module._qkv_same_embed_dim = False
        encoder: Any = self.encoder
        if encoder is not None and not hasattr(encoder, "rpe_nested"):
            encoder.rpe_nested = encoder.use_nested_tensor  # of padded batches, in evaluation
            encoder.use_nested_tensor = False

    def strip(self) -> None:
        module = self.module
        take_off(module)
        del module.rpe_backend
        module._qkv_same_embed_dim = True
        module.__class__ = nn.MultiheadAttention
        encoder: Any = self.encoder
        if encoder is not None and not _equipped(encoder):
            encoder.use_nested_tensor = encoder.rpe_nested
            del encoder.rpe_nested


def _equipped(model: nn.Module) -> bool:
    return any(isinstance(m, EquippedMultiheadAttention) for m in model.modules())


class EquippedMultiheadAttention(nn.MultiheadAttention):
    """torch's MultiheadAttention with a position encoding; arguments and results are its own."""

    rpe_backend: str

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        geometry = here()
        if geometry is None:
            raise IrpeError(
                "no grid: call the model inside `with irpe.located(irpe.Grid(height, width)):`"
            )
        if is_causal and attn_mask is None:
            raise IrpeError("is_causal=True needs attn_mask, as in torch")
        if query.is_nested:
            raise IrpeError(
                "a nested tensor has lost its grid: attach to the whole nn.TransformerEncoder, "
                "which then keeps padded ones, or give it enable_nested_tensor=False"
            )
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        encodings = hooks(self)
        query, key = encodings.inputs(query, key, geometry)
        weights, bias = self.in_proj_weight.chunk(3), self.in_proj_bias
        biases = (None, None, None) if bias is None else bias.chunk(3)
        q, k, v = (
            nn.functional.linear(x, w, b).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        mask = _merged(key_padding_mask, attn_mask, q)
        q, k = encodings.transform(q, k, geometry)
        terms, scale = encodings.terms(geometry), self.head_dim**-0.5
        dropout, backend = self.dropout if self.training else 0.0, self.rpe_backend
        x = attention(q, k, v, terms, mask, dropout_p=dropout, scale=scale, backend=backend)
        x = self.out_proj(x.transpose(1, 2).flatten(2))
        given = None
        if need_weights:
            given = probabilities(q, k, terms, mask, scale)
            given = given.mean(1) if average_attn_weights else given
        if not batched:
            return x.squeeze(0), None if given is None else given.squeeze(0)
        return (x if self.batch_first else x.transpose(0, 1)), given


def probabilities(
    q: Tensor, k: Tensor, terms: tuple[Term, ...], mask: Tensor | None, scale: float
) -> Tensor:
    """``[B, H, L, S]``: what attention gives to one-hot values."""
    eye = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
    terms = tuple(t for t in terms if t.kind != "value")
    return attention(q, k, eye, terms, mask, scale=scale)


def _merged(padding: Tensor | None, mask: Tensor | None, q: Tensor) -> Tensor | None:
    """torch's two masks, where True means unseen, as one that is added or True where seen."""
    parts = []
    if padding is not None:
        parts.append(padding[:, None, None])
    if mask is not None:
        parts.append(mask.unflatten(0, (q.shape[0], -1)) if mask.dim() == 3 else mask)
    if not parts:
        return None
    if all(part.dtype == torch.bool for part in parts):
        return ~parts[0] if len(parts) == 1 else ~(parts[0] | parts[1])
    added = [
        torch.zeros_like(part, dtype=q.dtype).masked_fill(part, -math.inf)
        if part.dtype == torch.bool
        else part.to(q.dtype)
        for part in parts
    ]
    return added[0] if len(added) == 1 else added[0] + added[1]
