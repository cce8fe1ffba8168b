"""Specs in the configuration of transformers' models, which ``save_pretrained`` writes."""

from typing import Any

from torch import nn

from ..encodings import specs


def is_pretrained(model: nn.Module) -> bool:
    """Return whether a model has transformers' ``save_pretrained`` and its configuration."""
    config = getattr(model, "config", None)
    return hasattr(model, "save_pretrained") and hasattr(config, "to_json_string")


def remember_specs(model: nn.Module) -> None:
    """Write the specs of transformers' models into their configurations, under ``irpe``.

    ``save_pretrained`` then writes them into ``config.json``, where ``irpe.load`` reads them.
    """
    outer: list[str] = []
    for path, module in model.named_modules():
        # An inner model shares the configuration; paths are relative to the outermost model.
        if not is_pretrained(module) or any(path.startswith(f"{p}.") or not p for p in outer):
            continue
        outer.append(path)
        config: Any = module.config
        found = specs(module)
        if found:
            config.irpe = found
        elif hasattr(config, "irpe"):
            del config.irpe
