"""Parameter groups: tables with a learning rate and a weight decay of their own."""

from typing import Any

from torch import nn

from ..encodings import Encoding
from ..errors import IrpeError


def param_groups(
    model: nn.Module,
    *,
    weight_decay: float = 0.0,
    lr: float | None = None,
    table_weight_decay: float | None = None,
    table_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Groups for any torch optimiser.

    Args:
        model: a model with encodings.
        weight_decay, lr: of the model's own parameters; vectors, scalars and what its
            ``no_weight_decay()`` names do not decay. None: the optimiser's learning rate.
        table_weight_decay, table_lr: of the encodings' tables. None: as for the model's own (the
            released models decay their tables).

    Returns:
        Up to four groups, each with a ``name``: weights, no_decay, tables, and frequencies, which
        are learned but, as their authors have it, never decay (``rope-mixed``).

    Raises:
        IrpeError: if the model has no encoding.
    """
    if not isinstance(model, nn.Module):
        raise IrpeError(f"a model is a torch.nn.Module, not {type(model).__name__}")
    encodings = [m for m in model.modules() if isinstance(m, Encoding)]
    tables = {id(p) for encoding in encodings for p in encoding.parameters()}
    lasting = {id(p) for e in encodings if not e.decays for p in e.parameters()}
    if not encodings:
        raise IrpeError(f"this {type(model).__name__} has no encoding: attach one first")
    skip: set[str] = getattr(model, "no_weight_decay", set)()
    groups: dict[str, dict[str, Any]] = {
        "weights": {"params": [], "weight_decay": weight_decay, "lr": lr},
        "no_decay": {"params": [], "weight_decay": 0.0, "lr": lr},
        "tables": {
            "params": [],
            "weight_decay": weight_decay if table_weight_decay is None else table_weight_decay,
            "lr": lr if table_lr is None else table_lr,
        },
        "frequencies": {
            "params": [],
            "weight_decay": 0.0,
            "lr": lr if table_lr is None else table_lr,
        },
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in tables:
            kind = "frequencies" if id(parameter) in lasting else "tables"
        else:
            kind = "no_decay" if parameter.ndim <= 1 or name in skip else "weights"
        groups[kind]["params"].append(parameter)
    return [
        {"name": name, **{k: v for k, v in group.items() if v is not None}}
        for name, group in groups.items()
        if group["params"]
    ]
