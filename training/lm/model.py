"""Build the models of train_lm.py, and load weights into them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import irpe
from irpe.tools.weights import read_weights
from models.text import (
    Bert,
    Body,
    CausalLM,
    Classifier,
    SpanFinder,
    released_options,
    released_weights,
)
from training.errors import UserError
from training.lm.options import LmConfig
from training.recompute import recompute
from training.seeding import derive
from training.weights import apply_weights

OPTIONS = "model, encoding, attach and data"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def specs(config: LmConfig) -> list[irpe.Spec]:
    """Return the encodings that a config asks for; raise ``irpe.IrpeError`` for unknown ones."""
    given = config.encoding if isinstance(config.encoding, list) else [config.encoding]
    return [irpe.parse(text) for text in [*given, config.attach] if text is not None]


def encoding_name(config: LmConfig) -> str:
    """Say which encodings a config asks for, as in a run's name."""
    return "+".join(map(str, specs(config))) or "none"


def build_language_model(config: LmConfig, vocab_size: int) -> CausalLM:
    """Create the language model and load ``config.checkpoint`` into it."""
    options = _sizes(config)
    return _built(
        config, lambda: CausalLM(vocab_size, config.encoding, tied=config.model.tied, **options)
    )


def build_classifier(config: LmConfig, num_classes: int) -> Classifier:
    """Create a classifier of bytes and load ``config.checkpoint`` into it."""
    body = {**_sizes(config), "encoding": config.encoding}
    return _built(config, lambda: Classifier(Body(256, **body), num_classes))


def build_span_finder(config: LmConfig, vocab_size: int) -> SpanFinder:
    """Create a model that finds answers, our own or a released BERT, and load the checkpoint."""
    if config.model.pretrained is None:
        body = {**_sizes(config), "encoding": config.encoding, "types": 2}
        return _built(config, lambda: SpanFinder(Body(vocab_size, **body)))
    folder = Path(config.model.pretrained)
    options = released_config(folder)
    if config.encoding != options["encoding"]:
        raise UserError(
            f"encoding: {config.encoding!r} is not that of {str(folder)!r}, which is "
            f"{options['encoding']}; give that one"
        )
    if vocab_size > options["vocab_size"]:
        raise UserError(
            f"model.pretrained: the vocabulary in {str(folder)!r} has {vocab_size} tokens, but the "
            f"model {options['vocab_size']}"
        )
    path = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"model.pretrained: {str(folder)!r} holds none of {', '.join(_WEIGHTS)}")

    def released() -> SpanFinder:
        model = SpanFinder(Bert(**options, backend=config.backend))
        weights = released_weights(read_weights(path), options["encoding"])
        head = {f"head.{name}": value for name, value in model.head.state_dict().items()}
        apply_weights(model, {**head, **weights}, path, "the config.json beside it")
        return model

    return _built(config, released)


def released_config(folder: Path) -> dict[str, Any]:
    """Return a BERT's options from the ``config.json`` of its folder."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model.pretrained: cannot read {str(path)!r}: {error}") from error
    return released_options(content)


def _sizes(config: LmConfig) -> dict[str, Any]:
    model = config.model
    for name in ("dim", "depth", "num_heads"):
        if getattr(model, name) < 1:
            raise UserError(f"model.{name}: {getattr(model, name)} is not at least 1")
    for name in ("drop", "attn_drop", "act_drop"):
        if not 0 <= getattr(model, name) < 1:
            raise UserError(f"model.{name}: {getattr(model, name)} is not in [0, 1)")
    names = ("dim", "depth", "num_heads", "mlp_ratio", "drop", "attn_drop", "act_drop")
    return {**{name: getattr(model, name) for name in names}, "backend": config.backend}


def _built(config: LmConfig, make: Callable[[], Any]) -> Any:
    """Make a model with its own seed, put the further encoding on, and load the checkpoint.

    A checkpoint may be from before the encoding was attached: that then stays as it starts.
    """
    torch.manual_seed(derive(config.seed, "model"))
    model: nn.Module = make()
    before = set(model.state_dict())
    if config.attach is not None:
        model.body.attach(config.attach)  # type: ignore[operator, union-attr]
    if config.checkpoint is not None:
        weights = read_weights(config.checkpoint)
        own: dict[str, Tensor] = model.state_dict()
        added = {name: own[name] for name in own if name not in before | set(weights)}
        apply_weights(model, {**weights, **added}, config.checkpoint, OPTIONS)
    if config.model.grad_checkpointing:
        recompute(model.body.blocks)  # type: ignore[arg-type, union-attr]
    return model
