"""torch's ``nn.MultiheadAttention``, and models built on it: ``nn.TransformerEncoder``, DETR.

These modules have no access to the positions of their tokens, so the caller sets them around the
forward pass: ``with irpe.located(grid):``. Queries and keys may have different positions
(cross-attention).
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..encodings import encodings_of
from ..errors import IrpeError
from ..spec import Spec
from .attend import attend
from .base import Site, plain_class
from .carry import geometry_of, located_prefix, refuse_fx


def find_sites(model: nn.Module) -> Iterator[Site]:
    """Yield the attention modules of a model, except pooling: a learned query has no position."""
    pooling: set[int] = set()
    encoders: dict[int, nn.TransformerEncoder] = {}
    for module in model.modules():
        inside = {id(m) for m in module.modules() if isinstance(m, nn.MultiheadAttention)}
        if type(module).__name__.lower().endswith(("pooler", "pooling", "poolinghead")):
            pooling |= inside
        if isinstance(module, nn.TransformerEncoder):
            encoders |= dict.fromkeys(inside, module)
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and id(module) not in pooling:
            yield MhaSite(name, module, encoders.get(id(module)))


class MhaSite(Site):
    """One ``nn.MultiheadAttention``.

    Args:
        name: path of the module in the model.
        module: the attention module.
        encoder: the ``nn.TransformerEncoder`` that contains it, if any.
    """

    def __init__(
        self, name: str, module: nn.Module, encoder: nn.TransformerEncoder | None = None
    ) -> None:
        super().__init__(name, module)
        self.kind, self.encoder = AttachedMultiheadAttention, encoder

    def sizes(self) -> dict[str, Any]:
        dim, heads = self.module.embed_dim, self.module.num_heads
        return {"dim": dim, "num_heads": heads, "prefix": located_prefix()}

    def unsupported(self, spec: Spec) -> str | None:
        module = self.module
        if plain_class(module) is not nn.MultiheadAttention:
            return f"{type(module).__name__} computes its attention in its own way"
        if module.bias_k is not None or module.add_zero_attn:
            return "it adds a key without a position (add_bias_kv or add_zero_attn)"
        return super().unsupported(spec)

    def add(self, spec: Spec | None, *, backend: str, native: str) -> None:
        super().add(spec, backend=backend, native=native)
        module, encoder = self.module, self.encoder
        # With True, torch's encoder layers do not call forward() in evaluation mode.
        module.__dict__["rpe_same"] = module._qkv_same_embed_dim
        module._qkv_same_embed_dim = False
        if encoder is not None and "rpe_nested" not in encoder.__dict__:
            encoder.__dict__["rpe_nested"] = encoder.use_nested_tensor
            encoder.use_nested_tensor = False

    def remove(self) -> None:
        super().remove()
        module, encoder = self.module, self.encoder
        module._qkv_same_embed_dim = module.__dict__.pop("rpe_same")
        if encoder is None or "rpe_nested" not in encoder.__dict__:
            return
        if not any(isinstance(m, AttachedMultiheadAttention) for m in encoder.modules()):
            encoder.use_nested_tensor = encoder.__dict__.pop("rpe_nested")


class AttachedMultiheadAttention(nn.MultiheadAttention):
    """torch's MultiheadAttention with encodings; same arguments and results."""

    def _reset_parameters(self) -> None:
        self._qkv_same_embed_dim = self.__dict__["rpe_same"]
        super()._reset_parameters()
        self._qkv_same_embed_dim = False

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
        refuse_fx(query, type(self).__name__)
        geometry = geometry_of(self)
        if is_causal and attn_mask is None:
            raise IrpeError("is_causal=True needs attn_mask, as in torch")
        if query.is_nested:
            raise IrpeError(
                "nested tensors have no grid: attach to the whole nn.TransformerEncoder, which "
                "then uses padded tensors, or pass it enable_nested_tensor=False"
            )
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        try:
            geometry.check(query.shape[0], query.shape[1], key.shape[1])
        except IrpeError as error:
            raise IrpeError(
                f"{error}: attach with where= to the modules whose tokens have these positions, "
                "or call this one inside its own `with irpe.located(...)`"
            ) from None
        query, key = encodings_of(self).inputs(query, key, geometry)
        bias, weight = self.in_proj_bias, self.in_proj_weight
        weights = (  # separate ones if keys or values have another width
            (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            if weight is None
            else weight.chunk(3)
        )
        biases = (None, None, None) if bias is None else bias.chunk(3)
        q, k, v = (
            nn.functional.linear(x, w, b).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        x, probabilities = attend(
            self,
            q,
            k,
            v,
            geometry,
            scale=self.head_dim**-0.5,
            mask=_merged(key_padding_mask, attn_mask, q, k),
            dropout_p=self.dropout if self.training else 0.0,
            need_weights=need_weights,
        )
        x = self.out_proj(x.transpose(1, 2).flatten(2))
        if probabilities is not None and average_attn_weights:
            probabilities = probabilities.mean(1)
        if not batched:
            return x.squeeze(0), None if probabilities is None else probabilities.squeeze(0)
        return (x if self.batch_first else x.transpose(0, 1)), probabilities


def _merged(padding: Tensor | None, mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Merge torch's masks, where True means masked, into one that is added or True where kept."""
    (B, H, L), S = q.shape[:3], k.shape[2]
    _check("key_padding_mask", padding, (B, S))
    _check("attn_mask", mask, (L, S), (B * H, L, S))
    parts = [] if padding is None else [padding[:, None, None]]
    if mask is not None:
        parts.append(mask.unflatten(0, (q.shape[0], -1)) if mask.dim() == 3 else mask)
    if not parts:
        return None
    if all(part.dtype == torch.bool for part in parts):
        return ~functools.reduce(torch.logical_or, parts)
    hidden = torch.tensor(-math.inf, dtype=q.dtype, device=q.device)
    added = (hidden.where(p, 0.0) if p.dtype == torch.bool else p.to(q.dtype) for p in parts)
    return functools.reduce(torch.add, added)


def _check(name: str, mask: Tensor | None, *shapes: tuple[int, ...]) -> None:
    """Raise IrpeError unless a mask is None, or one that torch takes."""
    if mask is None:
        return
    if all(tuple(mask.shape) != shape for shape in shapes):
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise IrpeError(f"{name} is {list(mask.shape)}, not {wanted}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise IrpeError(
            f"{name} is bool (True: masked) or floating point (added), not {mask.dtype}"
        )
