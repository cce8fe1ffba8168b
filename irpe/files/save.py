"""``irpe.save``."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..encodings import encodings_of, specs
from ..errors import IrpeError
from .read import Checkpoint, write_checkpoint


def save(model: nn.Module, file: str | Path) -> None:
    """Save a model's weights and specs in a safetensors file, atomically.

    Shared parameters are written under each of their names, so that the file loads strictly
    everywhere. ``irpe.load`` reads it.

    Args:
        model: any model, with or without encodings; a wrapper of ``torch.compile`` or
            ``DistributedDataParallel`` is removed.
        file: a name that ends in ``.safetensors``; an existing file is replaced.

    Raises:
        IrpeError: if the suffix differs, the folder does not exist, the state dict has values that
            are not tensors, or safetensors is not installed.
    """
    model = unwrapped(model)
    if Path(file).suffix != ".safetensors":
        raise IrpeError(f"cannot save to {str(file)!r}: the name must end in .safetensors")
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.is_meta:
            what = "on the meta device" if isinstance(value, Tensor) else type(value).__name__
            raise IrpeError(f"cannot save {name}: it is {what}, not a tensor with values")
    weights = {name: value.detach().cpu() for name, value in state.items()}
    write_checkpoint(file, Checkpoint(weights, metadata(model)))


def metadata(model: nn.Module) -> dict[str, str]:
    """Return the header of a file for a model: ``format``, ``irpe``, ``irpe_model``."""
    own = {id(model.get_submodule(path)): spec for path, spec in specs(model).items()}
    places = model.named_modules(remove_duplicate=False)  # a module may be in several places
    found = {path: own[id(module)] for path, module in places if id(module) in own}
    about = {"format": "pt", "irpe": json.dumps(found)}
    options = {
        path: given for path in found if (given := attach_options(model.get_submodule(path)))
    }
    if options:
        about["irpe_options"] = json.dumps(options)
    built = _timm_config(model)
    if built is not None:
        about["irpe_model"] = built
    return about


def attach_options(module: nn.Module) -> dict[str, Any]:
    """Return the options of ``attach`` for a module that differ from the defaults."""
    options: dict[str, Any] = {}
    if getattr(module, "rpe_native", "keep") != "keep":
        options["native"] = getattr(module, "rpe_native", "keep")
    # For nn.MultiheadAttention, and timm's blocks in a user's model, `located` sets the prefix.
    parts = [part for encoding in encodings_of(module).encodings for part in encoding.modules()]
    prefix = max((int(getattr(part, "prefix", 0)) for part in parts), default=0)
    if prefix:
        options["prefix"] = prefix
    return options


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrapper of ``torch.compile``, DataParallel or DDP."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _timm_config(model: Any) -> str | None:
    """Return timm's ``config.json`` of a model; None for other models or unknown arguments."""
    library: Any = sys.modules.get("timm.models._hub")
    if library is None or not isinstance(getattr(model, "pretrained_cfg", None), dict):
        return None
    if not hasattr(model, "_model_args"):  # not made by timm.create_model
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        try:
            library.save_config_for_hf(model, str(path))
        except (ValueError, TypeError, KeyError, AttributeError):  # arguments that are not JSON
            return None
        return json.dumps(json.loads(path.read_text(encoding="utf-8")))
