"""The tables of timm's native relative biases, as terms of the model's own parameters."""

from typing import Any

from timm.layers import RelPosBias, RelPosBiasTf, RelPosMlp
from timm.models import beit
from torch import Tensor, nn

from ...encodings.window import window_terms
from ...geometry import Geometry
from ...terms import Term
from .override import attached_classes


class _Shared(nn.Module):
    """A fused bias that a model passes to all its blocks as a table ``[N, H]``."""

    def forward(self) -> Tensor:
        return bias_table(self)

    get_bias = forward


SHARED: Any = attached_classes(
    dict.fromkeys((beit.RelativePositionBias, RelPosBias, RelPosBiasTf, RelPosMlp), _Shared),
    __name__,
)


def bias_terms(owner: Any, geometry: Geometry) -> tuple[Term, ...]:
    """Return the term of a module's relative bias; no term if it has none."""
    if owner is None or getattr(owner, "relative_position_bias_table", owner) is None:
        return ()
    return window_terms(bias_table(owner), geometry, tuple(owner.window_size))


def bias_table(owner: Any) -> Tensor:
    """Return ``[N, H]``: a row for each offset query - key, see ``window_terms``."""
    if isinstance(owner, RelPosMlp):
        made: Tensor = owner.bias_act(owner.mlp(owner.rel_coords_log)).flatten(0, 1)
        return made if owner.bias_gain is None else made * owner.bias_gain
    table: Tensor = owner.relative_position_bias_table
    if isinstance(owner, RelPosBiasTf):  # [H, rows, columns] of the offsets key - query
        return table.flip(1, 2).flatten(1).t()
    return table
