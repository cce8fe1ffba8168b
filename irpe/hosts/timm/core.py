"""How a host's attention is answered: its forward pass stays its own, but for one call.

timm's modules end in one call of ``scaled_dot_product_attention``, behind their projections, norms,
rotary embeddings and biases. A ``Core`` rides to that call in the place of the mask and answers it
by ``irpe.attention``: torch asks an argument that has a ``__torch_function__``. So nothing of a
host is written again here, and no state outlives a call.
"""

import operator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...encodings import hooks
from ...errors import IrpeError
from ...functional import attention
from ...geometry import Geometry, Grid

# Eager calls the methods, a compiler the operator.
_ADD = (operator.add, torch.add, Tensor.add, Tensor.__add__)


class Located:
    """A geometry on its way to the attention modules, in the place of an argument it carries."""

    def __init__(self, geometry: Geometry, carried: Any) -> None:
        self.geometry, self.carried = geometry, carried


class Equipped(nn.Module):
    """Mixed into a host's attention module.

    ``argument``: which of its block's arguments the module is handed through, by name; the
    geometry travels there. None: it sees the geometry by itself.
    """

    argument: ClassVar[str | None] = None
    rpe_backend: str
    rpe_own: str

    if TYPE_CHECKING:  # what hosts hold is not known here

        def __getattr__(self, name: str) -> Any: ...

    @property
    def fused_attn(self) -> bool:
        """The host's way that ends in one call of scaled_dot_product_attention."""
        return True

    @fused_attn.setter
    def fused_attn(self, value: bool) -> None:
        self.__dict__["fused_attn"] = value  # counts again once the module is stripped

    @property
    def has_encoding(self) -> bool:
        """Not for one that only shares its block with an equipped one."""
        return bool(hooks(self).encodings)

    @property
    def keeps(self) -> bool:
        """Whether its own rotary embedding or relative bias goes on."""
        return self.rpe_own == "keep"

    @property
    def drops(self) -> float:
        """The probability of dropout now."""
        return self.attn_drop.p if self.training else 0.0

    def folded(self, x: Tensor) -> Tensor:
        """Queries, keys, values or a mask as ``[B, H, L, D]``, where the host has other axes."""
        return x

    def unfolded(self, x: Tensor, like: Tensor) -> Tensor:
        """Undo ``folded``; ``like``: the queries before it."""
        return x

    def grid(self, height: int, width: int) -> Grid:
        """The grid of a window; the last one is held, since windows hardly ever change."""
        sizes = isinstance(height, int) and isinstance(width, int)
        if torch.compiler.is_compiling() or not sizes:
            return Grid(height, width)
        last: Grid | None = self.__dict__.get("rpe_grid")
        if last is None or (last.height, last.width) != (height, width):
            last = self.__dict__["rpe_grid"] = Grid(height, width)
        return last


class Core:
    """Answers the attention of one module, at the positions of one forward pass."""

    def __init__(self, module: Any, geometry: Geometry, mask: Tensor | None) -> None:
        self.module, self.geometry, self.mask = module, geometry, mask

    def plus(self, mask: Tensor) -> "Core":
        """With another mask added, as hosts add their own bias to what they are handed."""
        return Core(self.module, self.geometry, mask if self.mask is None else self.mask + mask)

    def __add__(self, mask: Tensor) -> "Core":
        return self.plus(mask)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            return answered(*args, **(kwargs or {}))
        if function in _ADD:
            first, second = args
            return first.plus(second) if isinstance(first, Core) else second.plus(first)
        return NotImplemented


def answered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Core,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """scaled_dot_product_attention with a core for its mask; ``[B, H, L, D]``."""
    module, geometry = attn_mask.module, attn_mask.geometry
    if scale is None:  # of the channels that the host made: an encoding may add some
        scale = width(module) ** -0.5
    encodings, before, mask = hooks(module), q, attn_mask.mask
    q, k, v = (module.folded(x) for x in (q, k, v))
    q, k = encodings.transform(q, k, geometry)
    out = attention(
        q,
        k,
        v,
        encodings.terms(geometry),
        mask=None if mask is None else module.folded(mask),
        is_causal=is_causal,
        dropout_p=dropout_p,
        scale=scale,
        backend=module.rpe_backend,
    )
    return module.unfolded(out, before)


def opened(argument: Any) -> Located:
    """What travelled to an attention module.

    Raises:
        IrpeError: if nothing did.
    """
    if not isinstance(argument, Located):
        raise IrpeError(
            "no grid: this block was called by itself. Go through model.blocks after "
            "model.patch_embed(image), as the model's own forward does"
        )
    return argument


def width(module: Any) -> int:
    """D, the channels of a head, which hosts name as they like."""
    for name in ("head_dim", "dim_head", "key_dim"):
        if hasattr(module, name):
            return int(getattr(module, name))
    layer, heads = (
        (module.qkv, 3 * module.num_heads)
        if hasattr(module, "qkv")
        else (module.q, module.num_heads)
    )
    made = layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
    return int(made) // heads


def unreadable(module: Any) -> str | None:
    """What a host needs of its projection that a quantised one does not hold out; None if nothing.

    Hosts with a bias for queries alone read the weight; torch.ao makes a method of it.
    """
    if getattr(module, "q_bias", None) is None or getattr(module, "qkv_bias_separate", False):
        return None
    if not callable(getattr(module.qkv, "weight", None)):
        return None
    return (
        "its qkv is quantised, and timm reads that layer's weight by itself: "
        "leave the layers named qkv out of the quantisation"
    )


def check_readable(module: nn.Module) -> None:
    """Raises IrpeError where a projection was quantised that the host cannot use then."""
    why = unreadable(module)
    if why is not None:
        raise IrpeError(f"{type(module).__name__} cannot run: {why}")
