"""Load weights into a model, all of them or none; ``irpe.tools.weights`` reads them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from training.errors import UserError

_SHOWN = 6


def apply_weights(
    model: nn.Module,
    weights: dict[str, Tensor],
    path: str | Path,
    options: str = "model.name, model.kwargs and rpe",
) -> None:
    """Load ``weights`` into ``model``, all of them or none.

    ``options`` are what decides about the architecture, for the error message. Raises
    :class:`UserError` that lists the keys which are missing, unexpected, of another shape or kind.
    """
    state = model.state_dict()
    own = {key: tuple(value.shape) for key, value in state.items()}
    given = {key: tuple(value.shape) for key, value in weights.items()}
    # Floating point of another precision is converted.
    kinds = [
        f"{key} {weights[key].dtype} in the file, {value.dtype} in the model"
        for key, value in state.items()
        if key in weights and weights[key].is_floating_point() != value.is_floating_point()
    ]
    differences = [
        ("missing in the file", [key for key in own if key not in given]),
        ("unknown to the model", [key for key in given if key not in own]),
        (
            "of another shape",
            [
                f"{key} {list(given[key])} in the file, {list(own[key])} in the model"
                for key in own
                if key in given and given[key] != own[key]
            ],
        ),
        ("of another kind", kinds),
    ]
    parts = []
    for kind, items in differences:
        if items:
            more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
            parts.append(f"{len(items)} {kind}: {', '.join(items[:_SHOWN])}{more}")
    if parts:
        raise UserError(
            f"checkpoint {str(path)!r} is of another architecture than this model "
            f"({'; '.join(parts)}); {options} must be those it was made with"
        )
    model.load_state_dict(weights)
