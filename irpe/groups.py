"""Parameter groups: tables with their own learning rate and weight decay, and layer decay."""

from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from .encodings import Encoding
from .errors import IrpeError


def param_groups(
    model: nn.Module,
    *,
    weight_decay: float = 0.0,
    lr: float | None = None,
    table_weight_decay: float | None = None,
    table_lr: float | None = None,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Return parameter groups for any torch optimiser.

    Args:
        model: a model with encodings, or a module that contains one.
        weight_decay: weight decay of the model's other parameters. Vectors, biases and the
            parameters that any module's ``no_weight_decay()`` lists have none.
        lr: learning rate; None: the optimiser's.
        table_weight_decay: weight decay of the encodings' tables. None: ``weight_decay``, as in the
            released models, or 0 if ``no_weight_decay()`` lists the tables.
        table_lr: learning rate of the tables, which ``layer_decay`` does not scale; None: ``lr``.
        layer_decay: factor of the learning rate from each layer to the one below it, as in timm;
            needs ``lr`` and a timm model (``group_matcher``).

    Returns:
        Groups with a ``name``: weights, no_decay, tables, and frequencies (of ``rope-mixed``,
        without weight decay as in the authors' code). With ``layer_decay``, each layer has its own
        groups, such as ``layer_3_weights``.

    Raises:
        IrpeError: if the model has no encoding, or ``layer_decay`` is given without ``lr`` or for a
            model without ``group_matcher``.
    """
    if not isinstance(model, nn.Module):
        raise IrpeError(f"a model is a torch.nn.Module, not {type(model).__name__}")
    encodings = [m for m in model.modules() if isinstance(m, Encoding)]
    if not encodings:
        raise IrpeError(f"this {type(model).__name__} has no encoding: attach one first")
    for name, value in (
        ("weight_decay", weight_decay), ("lr", lr), ("table_weight_decay", table_weight_decay),
        ("table_lr", table_lr), ("layer_decay", layer_decay),
    ):  # fmt: skip
        if value is not None and not isinstance(value, int | float | Tensor):
            raise IrpeError(f"{name}={value!r} is not a number")
    if layer_decay is not None and lr is None:
        raise IrpeError(f"layer_decay={layer_decay} needs lr=, the learning rate of the last layer")
    tables = {id(p) for encoding in encodings for p in encoding.parameters()}
    frequencies = {id(p) for e in encodings if not e.decays for p in e.parameters()}
    exempt = _exempt(model)
    scales = {} if layer_decay is None else _scales(model, layer_decay)
    if table_weight_decay is None:
        named = any(id(p) in tables for name, p in model.named_parameters() if name in exempt)
        table_weight_decay = 0.0 if named else weight_decay
    decays = {"weights": weight_decay, "no_decay": 0.0, "frequencies": 0.0}
    decays["tables"] = table_weight_decay
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, scale = scales.get(name, ("", 1.0))
        rate = None if lr is None else lr * scale
        if id(parameter) in tables:
            kind = "frequencies" if id(parameter) in frequencies else "tables"
            rate = rate if table_lr is None else table_lr
        else:
            plain = parameter.ndim <= 1 or name.endswith(".bias") or name in exempt
            kind = "no_decay" if plain else "weights"
        group = groups.setdefault(
            f"{layer}{kind}",
            {"name": f"{layer}{kind}", "params": [], "weight_decay": decays[kind]}
            | ({} if rate is None else {"lr": rate}),
        )
        group["params"].append(parameter)
    return list(groups.values())


def _exempt(model: nn.Module) -> set[str]:
    """Return the parameter names that ``no_weight_decay()`` of any module lists."""
    found = set()
    for path, module in model.named_modules():
        listed: Any = getattr(module, "no_weight_decay", None)
        if callable(listed):
            names = [name for name, _ in module.named_parameters()]
            patterns = listed()
            found |= {
                f"{path}.{name}" if path else name
                for name in names
                if any(fnmatchcase(name, pattern) for pattern in patterns)
            }
    return found


def _scales(model: nn.Module, decay: float) -> dict[str, tuple[str, float]]:
    """Return each parameter's group prefix and learning rate factor, by timm's layer numbers.

    Parameters outside timm models are not in the result; their factor is 1.
    """
    scales: dict[str, tuple[str, float]] = {}
    for path, module in model.named_modules():
        inside = f"{path}." if path else ""
        matcher: Any = getattr(module, "group_matcher", None)
        if hasattr(module, "_orig_mod"):
            continue  # torch.compile's wrapper has the matcher of the model inside
        if not callable(matcher) or any(name.startswith(inside) for name in scales):
            continue
        layers = import_module("timm.models").group_parameters(
            module, matcher(coarse=False), reverse=True
        )
        last = max(layers.values())
        for name, layer in layers.items():
            scales[f"{inside}{name}"] = (f"{inside}layer_{layer}_", decay ** (last - layer))
    if not scales:
        raise IrpeError(
            f"layer_decay={decay}: the layers of {type(model).__name__} are not known, since no "
            "module in it has timm's group_matcher(); leave layer_decay out"
        )
    return scales
