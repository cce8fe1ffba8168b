"""Folders of transformers' ``save_pretrained``.

The library renames some parameters when it saves, and only ``from_pretrained`` maps them back. So a
second model of the same class, with its encodings attached, reads the weights.
"""

import json
import sys
from pathlib import Path
from typing import Any

from ..encodings import specs
from ..errors import IrpeError
from ..hosts import attach
from .read import Checkpoint, read_json


def read_pretrained(model: Any, folder: Path) -> Checkpoint:
    """Read a folder of ``save_pretrained`` with the names of ``model``'s parameters."""
    kind: Any = type(model)
    content = read_json((folder / "config.json").read_text(encoding="utf-8"))
    told = content.get("irpe") if isinstance(content, dict) else None
    wanted = specs(model) if told is None else aligned(model, told)

    def build(self: Any, config: Any, *args: Any, **given: Any) -> None:
        kind.__init__(self, config, *args, **given)
        if wanted:
            attach(self, wanted)

    # The library finds the name mapping by the name of the class.
    attached: Any = type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})
    library: Any = sys.modules["transformers"]
    level = library.logging.get_verbosity()
    library.logging.set_verbosity_error()  # irpe.load reports missing and unknown names
    try:
        made, info = attached.from_pretrained(folder, dtype="auto", output_loading_info=True)
    except Exception as error:  # the library raises many exceptions
        raise IrpeError(
            f"transformers cannot read {str(folder)!r} as {kind.__name__}: {error!s:.200}"
        ) from error
    finally:
        library.logging.set_verbosity(level)
    weights = {n: v for n, v in made.state_dict().items() if n not in info["missing_keys"]}
    # Placeholder values: irpe.load only reports or ignores these names.
    weights |= {name: next(iter(made.parameters())) for name in info["unexpected_keys"]}
    return Checkpoint(weights, {} if told is None else {"irpe": json.dumps(wanted)})


def aligned(model: Any, named: dict[str, Any]) -> dict[str, Any]:
    """Add or remove the prefix of the base model, so that names match the model's."""
    base = f"{getattr(model, 'base_model_prefix', '')}."
    if base == "." or not named:
        return named
    inside = any(name.startswith(base) for name in named)
    wanted = any(name.startswith(base) for name, _ in model.named_modules())
    if wanted and not inside:
        return {base + name: value for name, value in named.items()}
    if inside and not wanted:
        return {name.removeprefix(base): value for name, value in named.items()}
    return named
