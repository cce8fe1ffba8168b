"""Attention maps of a running image model, and mean distances of attention.

Shapes: H heads, L tokens: P prefix tokens and a grid of height x width patches.
"""

from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from ..backends import reference
from ..encodings import specs
from ..errors import IrpeError
from ..geometry import Grid
from ..hosts import attach, detach
from ..hosts.maps import record_calls
from ..terms import Term

# Attached to models without an encoding, to record their attention: its tables are zero.
_NEUTRAL = "rpe-1.9-product-bias-1-k"


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention of one layer for one query.

    Args:
        attention: probabilities ``[H, height, width]`` of the patches as keys.
        prefix: total probability ``[H]`` of the prefix tokens.
        position: additive bias of the encoding, ``[H, height, width]``; None without one, as for
            rotary embeddings.
        distances: mean distance of attention over all queries, in patches, ``[H]``.
    """

    attention: Tensor
    prefix: Tensor
    position: Tensor | None
    distances: Tensor


@torch.no_grad()
def watch(model: nn.Module, image: Tensor, grid: Grid, at: tuple[int, int]) -> list[Layer]:
    """Run a timm model on one image ``[1, C, height, width]`` and return its layers' attention.

    Args:
        model: the model.
        image: the image.
        grid: the model's patches and prefix tokens.
        at: (row, column) of the query.

    Raises:
        IrpeError: if the query is outside the grid, or attention is not over the whole grid.
    """
    row, column = at
    if not (0 <= row < grid.height and 0 <= column < grid.width):
        raise IrpeError(f"there is no patch {at} in a grid of {grid.height}x{grid.width}")
    plain = not specs(model)
    if plain:
        attach(model, _NEUTRAL)
    try:
        calls = record_calls(model, image)
    finally:
        if plain:
            detach(model)
    query = grid.prefix + row * grid.width + column
    return [
        _layer(grid, query, weights, q, k, () if plain else terms, scale)
        for weights, q, k, terms, scale in chain(*calls.values())
    ]


def _layer(
    grid: Grid,
    query: int,
    probabilities: Tensor,
    q: Tensor,
    k: Tensor,
    terms: tuple[Term, ...],
    scale: float,
) -> Layer:
    """Return the layer of one call of an attached module, see ``record_calls``."""
    length = grid.query_length
    if q.shape[0] != 1 or not q.shape[2] == k.shape[2] == length:
        raise IrpeError(
            f"this model's attention is not over all {length} tokens of a grid of "
            f"{grid.height}x{grid.width}: q {list(q.shape)}, k {list(k.shape)}"
        )

    def on_grid(pairs: Tensor) -> Tensor:
        """Return the query's row of ``[H, L, L]`` without the prefix: ``[H, height, width]``."""
        return pairs[:, query, grid.prefix :].reshape(-1, grid.height, grid.width)

    parts = [reference.position(term, q * scale, k, scale) for term in terms]
    added = [part.expand(1, q.shape[1], -1, -1) for part in parts if part is not None]
    return Layer(
        on_grid(probabilities[0]),
        probabilities[0, :, query, : grid.prefix].sum(-1),
        on_grid(torch.stack(added).sum(0)[0]) if added else None,
        mean_distances(probabilities[0], grid),
    )


def mean_distances(probabilities: Tensor, grid: Grid) -> Tensor:
    """Return the mean distance of attention ``[H]``, in patches, of probabilities ``[H, L, L]``.

    The mean over keys is weighted by the probabilities; the mean over queries is not weighted.
    Prefix tokens are excluded.
    """
    between = probabilities[:, grid.prefix :, grid.prefix :]
    places = Grid(grid.height, grid.width).offsets(between.device).to(between.dtype)
    far = places.square().sum(-1).sqrt()
    return ((between * far).sum(-1) / between.sum(-1)).mean(-1)
