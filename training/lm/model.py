"""Build the models of train_lm.py and load their weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import irpe
from irpe.files.read import read_weights
from models.text import (
    Bert,
    Body,
    CausalLM,
    Classifier,
    SpanFinder,
    released_options,
    released_weights,
)
from training.distributed import recompute
from training.errors import UserError, one_line
from training.lm.options import LmConfig
from training.seeding import derive
from training.weights import identity, start_from


def specs(config: LmConfig) -> list[irpe.Spec]:
    """Return the encodings of a config; raise ``irpe.IrpeError`` if one is unknown."""
    given = (text for text in (config.encoding, config.attach) if text is not None)
    return [part for text in given for part in irpe.parse(text).parts]


def encoding_name(config: LmConfig) -> str:
    """Return the encodings of a config as text, for the name of a run."""
    return " + ".join(map(str, specs(config))) or "none"


def build_language_model(config: LmConfig, vocab_size: int) -> CausalLM:
    """Create the language model and load ``config.checkpoint`` into it."""
    options = _sizes(config)
    return _built(
        config, lambda: CausalLM(vocab_size, config.encoding, tied=config.model.tied, **options)
    )


def build_classifier(config: LmConfig, classes: Sequence[str]) -> Classifier:
    """Create a classifier of bytes and load ``config.checkpoint`` into it."""
    body = {**_sizes(config), "encoding": config.encoding}
    return _built(config, lambda: Classifier(Body(256, **body), len(classes)), identity(classes))


def build_span_finder(config: LmConfig, vocab_size: int) -> SpanFinder:
    """Create a model that finds answers, new or a released BERT, and load the checkpoint."""
    if config.model.pretrained is None:
        body = {**_sizes(config), "encoding": config.encoding, "types": 2}
        return _built(config, lambda: SpanFinder(Body(vocab_size, **body)))
    folder = Path(config.model.pretrained)
    options = released_config(folder)
    if config.encoding != options["encoding"]:
        raise UserError(
            f"encoding: {config.encoding!r} is not that of {str(folder)!r}; "
            f"give {options['encoding']}"
        )
    if vocab_size > options["vocab_size"]:
        raise UserError(
            f"model.pretrained: the vocabulary in {str(folder)!r} has {vocab_size} tokens, but the "
            f"model has {options['vocab_size']}"
        )

    def released() -> SpanFinder:
        model = SpanFinder(Bert(**options, backend=config.backend))
        weights = released_weights(read_weights(folder), options["encoding"])
        head = {f"head.{name}": value for name, value in model.head.state_dict().items()}
        try:
            model.load_state_dict({**head, **weights})
        except RuntimeError as error:
            raise UserError(
                f"model.pretrained: the weights in {str(folder)!r} do not fit its config.json: "
                f"{one_line(error):.300}"
            ) from error
        return model

    return _built(config, released)


def released_config(folder: Path) -> dict[str, Any]:
    """Return the options of a BERT from the ``config.json`` in its folder."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model.pretrained: cannot read {str(path)!r}: {error}") from error
    return released_options(content)


def _sizes(config: LmConfig) -> dict[str, Any]:
    model = config.model
    names = ("dim", "depth", "num_heads", "mlp_ratio", "drop", "attn_drop", "act_drop")
    return {**{name: getattr(model, name) for name in names}, "backend": config.backend}


def _built(config: LmConfig, make: Callable[[], Any], classes: dict[str, str] | None = None) -> Any:
    """Create a model with the seed, attach the further encoding, and load the checkpoint.

    The checkpoint may lack the tables of the further encoding, which then keep their values.
    """
    torch.manual_seed(derive(config.seed, "model"))
    model: nn.Module = make()
    if config.attach is not None:
        model.body.attach(config.attach)
    if config.checkpoint is not None:
        heads, by_name = (model.head,) if classes else (), None
        if classes is None:
            by_name = ["tables"] if config.attach is not None else []
        more = {"training": not config.eval_only, "by_name": by_name}
        start_from(model, config.checkpoint, classes or {}, heads, **more)
    if config.model.grad_checkpointing:
        recompute(model.body.blocks)
    return model
