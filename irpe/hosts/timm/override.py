"""How an attached timm module runs its encodings: in timm's forward pass, with one call replaced.

timm's modules apply projections, norms, rotary embeddings and biases, then call
``scaled_dot_product_attention`` once. An ``AttentionOverride`` is passed as its attn_mask; its
``__torch_function__`` intercepts the call and computes ``irpe.attention``. So this package does not
copy timm's forward passes and stores no state between calls.
"""

import operator
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...encodings.window import window_terms
from ...errors import IrpeError
from ...geometry import Geometry
from ...terms import Term
from ..attend import attend
from ..carry import geometry_of

# The functions that + calls: methods in eager mode, the operator when compiled.
_ADD = (operator.add, torch.add, Tensor.add, Tensor.__add__)


class Attached(nn.Module):
    """A mixin for timm's attention modules."""

    rpe_native: str

    if TYPE_CHECKING:  # timm's attributes

        def __getattr__(self, name: str) -> Any: ...

    @property
    def fused_attn(self) -> bool:
        """True, so that timm calls scaled_dot_product_attention."""
        return True

    @fused_attn.setter
    def fused_attn(self, value: bool) -> None:
        self.__dict__["fused_attn"] = value  # read by ``explicit``, and after ``detach``

    @property
    def explicit(self) -> bool:
        """Whether ``attn_drop`` is called on the probabilities, as with fused_attn=False."""
        fused: bool | None = self.__dict__.get("fused_attn")
        if fused is not None:
            return not fused
        drop = getattr(self, "attn_drop", None)  # the class has no fused path
        return drop is not None and bool(drop._forward_hooks or drop._forward_pre_hooks)

    @property
    def keeps(self) -> bool:
        """Whether the native rotary embedding or relative bias is kept."""
        return self.rpe_native == "keep"

    def split(self, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return (mask, None) or (None, table) of a bias that a model passes to all its blocks."""
        if bias is None or self.rpe_native == "replace":
            return None, None
        return (None, bias) if bias.dim() == 2 else (bias, None)

    def native_terms(self, grid: Any) -> tuple[Term, ...]:
        """Return the native encoding as terms of its own parameters, for ``native="fuse"``."""
        raise NotImplementedError

    @property
    def drops(self) -> float:
        """The probability of attention dropout."""
        return self.attn_drop.p if self.training else 0.0

    def folded(self, x: Tensor) -> Tensor:
        """Return timm's queries, keys, values or mask as ``[B, H, L, D]``."""
        return x

    def unfolded(self, x: Tensor, like: Tensor) -> Tensor:
        """Undo ``folded``; ``like``: the queries before ``folded``."""
        return x


def attached_classes(mixins: Mapping[type, type[nn.Module]], home: str) -> dict[type, Any]:
    """Return a subclass of each class of timm, with its mixin as first base.

    The subclasses become attributes of the module ``home``, so that pickle finds them by name.
    """
    made: dict[type, Any] = {}
    for kind, mixin in mixins.items():
        name = f"Attached_{kind.__module__.rpartition('.')[2]}_{kind.__name__}"
        made[kind] = type(name, (mixin, kind), {"__module__": home})
        setattr(sys.modules[home], name, made[kind])
    return made


class AttentionOverride:
    """An attn_mask that computes the attention of one call of a module.

    Args:
        module: the attached module.
        mask: an additive mask ``[B, H, L, S]``, or None.
        geometry: default: ``geometry_of(module)``.
        table: table ``[N, H]`` of a fused bias that the model passes to all its blocks, or None.
    """

    def __init__(
        self,
        module: Any,
        mask: Tensor | None = None,
        geometry: Geometry | None = None,
        table: Tensor | None = None,
    ) -> None:
        why = unreadable(module)
        if why is not None:
            raise IrpeError(f"{type(module).__name__} cannot run: {why}")
        self.module, self.mask, self.table = module, mask, table
        self.geometry = geometry_of(module) if geometry is None else geometry

    def plus(self, mask: Tensor | int) -> "AttentionOverride":
        """Return an override with another mask added; timm adds its native bias this way."""
        if isinstance(mask, int):  # 0: no native bias
            return self
        mask = mask if self.mask is None else self.mask + mask
        return AttentionOverride(self.module, mask, self.geometry, self.table)

    __add__ = __radd__ = plus

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            return run_override(*args, **(kwargs or {}))
        if function in _ADD:
            first, second = args
            return first.plus(second) if isinstance(first, cls) else second.plus(first)
        return NotImplemented


def run_override(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: AttentionOverride,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Compute scaled_dot_product_attention with an override as its mask."""
    module, mask = attn_mask.module, attn_mask.mask
    drop: Callable[[Tensor], Tensor] | None = None
    if module.explicit:

        def drop(weights: Tensor) -> Tensor:
            weights = module.unfolded(weights, q)
            return module.folded(getattr(module, "attn_drop", nn.Identity())(weights))

    native = module.native_terms(attn_mask.geometry) if module.rpe_native == "fuse" else ()
    if attn_mask.table is not None:
        native += window_terms(attn_mask.table, attn_mask.geometry)
    out, _ = attend(
        module,
        module.folded(q),
        module.folded(k),
        module.folded(v),
        attn_mask.geometry,
        scale=width(module) ** -0.5 if scale is None else scale,
        mask=None if mask is None else module.folded(mask),
        is_causal=is_causal,
        dropout_p=dropout_p,
        drop=drop,
        native=native,
    )
    return module.unfolded(out, q)


def width(module: Any) -> int:
    """Return D, the channels of a head; its attribute name varies by class."""
    for name in ("head_dim", "dim_head", "key_dim"):
        if hasattr(module, name):
            return int(getattr(module, name))
    layer, parts = (module.qkv, 3) if hasattr(module, "qkv") else (module.q, 1)
    made = layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
    return int(made) // (parts * module.num_heads)


def unreadable(module: Any) -> str | None:
    """Return why a module cannot run with a quantised projection; None if it can.

    Modules with a separate query bias read ``qkv.weight``, which torch.ao replaces by a method.
    """
    if getattr(module, "q_bias", None) is None or getattr(module, "qkv_bias_separate", False):
        return None
    if not callable(getattr(module.qkv, "weight", None)):
        return None
    return (
        "its qkv is quantised, and timm reads that layer's weight directly: "
        "exclude the layers named qkv from quantisation"
    )
