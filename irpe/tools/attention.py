"""Attention of an image model as it runs: where one query looks, and how far all of them do.

Shapes: H heads, L tokens: P prefix tokens and a grid of height x width patches.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..backends import reference
from ..encodings import hooks
from ..errors import IrpeError
from ..functional import attention
from ..geometry import Grid
from ..hosts.timm.core import Core, width
from ..terms import Term


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a model, seen from one query.

    Args:
        attention: probabilities ``[H, height, width]`` of the patches as keys.
        prefix: probability ``[H]`` of the prefix tokens.
        position: what the encoding adds to the logits, ``[H, height, width]``; None where it adds
            nothing, as rotary embeddings do.
        distances: mean over all patches as queries of the distance at which they attend to
            patches, in patches, ``[H]``.
    """

    attention: Tensor
    prefix: Tensor
    position: Tensor | None
    distances: Tensor


def watch(model: nn.Module, image: Tensor, grid: Grid, at: tuple[int, int]) -> list[Layer]:
    """Run a model of timm's on one image ``[1, C, height, width]``, and return what its layers do.

    Args:
        grid: the model's patches and prefix tokens. at: the query's (row, column).

    Raises:
        IrpeError: for a patch that is not there, or a model whose tokens do not stay on one grid.
    """
    row, column = at
    if not (0 <= row < grid.height and 0 <= column < grid.width):
        raise IrpeError(f"there is no patch {at} in a grid of {grid.height}x{grid.width}")
    for module in model.modules():
        if hasattr(module, "fused_attn"):  # else it does not call what is watched here
            setattr(module, "fused_attn", True)  # noqa: B010  a type checker takes it for a module
    with torch.no_grad(), _Watch(grid, grid.prefix + row * grid.width + column) as seen:
        model.eval()(image)
    if not seen.layers:
        raise IrpeError(f"{type(model).__name__} calls no scaled_dot_product_attention")
    return seen.layers


def mean_distances(probabilities: Tensor, grid: Grid) -> Tensor:
    """Mean distance of attention ``[H]``, in patches, from probabilities ``[H, L, L]``.

    For each patch as query the mean over patches as keys, by their part of its attention; prefix
    tokens, which are nowhere, are left out on both sides. Then the mean over queries.
    """
    between = probabilities[:, grid.prefix :, grid.prefix :]
    places = Grid(grid.height, grid.width).offsets(between.device).to(between.dtype)
    far = places.square().sum(-1).sqrt()
    return ((between * far).sum(-1) / between.sum(-1)).mean(-1)


class _Watch(TorchFunctionMode):
    """Notes each call of scaled_dot_product_attention, a host's own or an equipped module's."""

    def __init__(self, grid: Grid, query: int) -> None:
        super().__init__()
        self.grid, self.query = grid, query
        self.layers: list[Layer] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            self._note(*args, **kwargs)
        return function(*args, **kwargs)

    def _note(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> None:
        length = self.grid.query_length
        if q.dim() == 4 and q.shape[2] == 1 != k.shape[2]:
            return  # a pooling at the end
        if q.dim() != 4 or q.shape[0] != 1 or not q.shape[2] == k.shape[2] == length:
            raise IrpeError(
                f"this model's attention is not that of one row of {length} tokens for a grid of "
                f"{self.grid.height}x{self.grid.width}: q {list(q.shape)}, k {list(k.shape)}"
            )
        terms: tuple[Term, ...] = ()
        channels = q.shape[-1]
        if isinstance(attn_mask, Core):
            module, geometry, attn_mask = attn_mask.module, attn_mask.geometry, attn_mask.mask
            encodings, channels = hooks(module), width(module)
            q, k = encodings.transform(q, k, geometry)
            terms = encodings.terms(geometry)
        scale = channels**-0.5 if scale is None else scale
        logit_terms = tuple(term for term in terms if term.kind != "value")
        # With values that are the unit vectors, attention gives its probabilities.
        unit = torch.eye(length, dtype=q.dtype).expand(1, k.shape[1], -1, -1)
        given: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "backend": "reference"}
        found = attention(q, k, unit, logit_terms, mask=attn_mask, **given)[0]
        parts = [reference.position(term, q * scale, k, scale) for term in logit_terms]
        added = [part.expand(1, q.shape[1], -1, -1) for part in parts if part is not None]
        self.layers.append(
            Layer(
                self._on_grid(found),
                found[:, self.query, : self.grid.prefix].sum(-1),
                self._on_grid(torch.stack(added).sum(0)[0]) if added else None,
                mean_distances(found, self.grid),
            )
        )

    def _on_grid(self, pairs: Tensor) -> Tensor:
        """``[H, L, L]`` -> the query's row, without the prefix: ``[H, height, width]``."""
        row = pairs[:, self.query, self.grid.prefix :]
        return row.reshape(-1, self.grid.height, self.grid.width)
