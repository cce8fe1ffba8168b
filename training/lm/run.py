"""Open the text and the model of train_lm.py.

With ``data.folder`` tokens are stored in a folder. File names end in digests of source and content;
a file that does not match is created again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

import irpe
from training.checkpoint import checksum
from training.errors import UserError
from training.lm.excerpts import ClassifyExcerpts
from training.lm.language import Held, Language
from training.lm.model import build_language_model, specs
from training.lm.options import LmConfig
from training.lm.questions import Answer
from training.task import Task
from training.text.corpus import digest, open_corpus
from training.text.options import TextConfig
from training.text.staged import TextPlan
from training.text.tokens import (
    PairTokens,
    Tokens,
    encode,
    find_pairs,
    make_tokens,
    map_stream,
    read_pairs,
)


def open_task(config: LmConfig, accelerator: Accelerator) -> Task:
    """Open the text and the model of the task of a config."""
    specs(config)
    if config.task != "language":
        kinds = {"excerpts": ClassifyExcerpts, "questions": Answer}
        return kinds[config.task](config, accelerator)
    _check(config)
    plan, splits = None, (config.split,) if config.eval_only else ("train", config.split)
    tokens, streams = open_text(config.data, accelerator, *splits)
    length = config.stages[-1].length
    if not config.eval_only:
        plan = TextPlan(len(streams[0]), config)
        plan.check_shards(accelerator.num_processes * config.grad_accum_steps)
        length = plan.lengths[-1]
    held = _held(config, accelerator, tokens, streams[-1], length)
    if plan is not None:
        _check_positions(config, max(plan.spans), *(scoring.length for scoring in held.plans))
    model = build_language_model(config, tokens.vocab_size)
    return Language(config, accelerator, model, held, tokens, plan, streams)


def open_text(
    config: TextConfig, accelerator: Accelerator, *splits: str
) -> tuple[Tokens, list[np.ndarray]]:
    """Return the tokeniser, and the stream of tokens of each split.

    With ``data.folder`` one process writes missing files, and the others read them.

    Raises:
        UserError: if the folder cannot be written, and errors of ``open_corpus``.
    """
    with accelerator.main_process_first():
        found = config.tokens == "bpe" and config.tokenizer is None
        texts = {split: open_corpus(config, split) for split in (*splits, *["train"] * found)}
        if config.folder is None:
            tokens = make_tokens(config, texts.get("train", ()))
            return tokens, [encode(texts[split], tokens, config.separator) for split in splits]
        folder = Path(config.folder)
        digests = {split: digest(text) for split, text in texts.items()}
        if found:
            tokens = _kept(
                folder / f"bpe-{config.vocab_size}.json",
                digests["train"],
                lambda path: find_pairs(texts["train"], config.vocab_size).save(path),
                read_pairs,
            )
        else:
            tokens = make_tokens(config, ())
        size, code = "bytes", ""
        if isinstance(tokens, PairTokens):
            size, code = str(tokens.vocab_size), tokens.digest
        streams = [
            _kept(
                folder / f"{split}-{size}.bin",
                f"{digests[split]} {code} {config.separator}",
                lambda path, split=split: encode(texts[split], tokens, config.separator, path),
                lambda path: map_stream(path, tokens),
            )
            for split in splits
        ]
    return tokens, streams


def _kept(name: Path, source: str, make: Callable[[Path], Any], read: Callable[[Path], Any]) -> Any:
    """Return what ``read`` returns for a file, created first if it is missing or outdated."""
    stem = f"{name.stem}-{hashlib.blake2b(source.encode(), digest_size=8).hexdigest()}"
    before = list(name.parent.glob(f"{name.stem}-*{name.suffix}"))
    for path in before:
        if path.stem == f"{stem}-{checksum(path)}":
            return read(path)
    if before:
        print(f"data.folder: {str(name)!r} is created again: it, its text or tokenizer changed")
    try:
        name.parent.mkdir(parents=True, exist_ok=True)
        made = name.with_name(f".{os.getpid()}-{name.name}")
        make(made)
        kept = made.rename(name.with_stem(f"{stem}-{checksum(made)}"))
        for path in {*before} - {kept}:
            path.unlink(missing_ok=True)
        return read(kept)
    except OSError as error:
        raise UserError(f"data.folder: cannot write {str(name)!r}: {error.strerror}") from error


def _check(config: LmConfig) -> None:
    """Raise for contradicting options, before text is read."""
    if config.optim.lr is None:
        raise UserError("optim.lr is not set, and a language model needs it, such as 2.0e-3")
    for name, usual in (("protocols", "{kind: nonoverlapping}"), ("stages", "{length: 256}")):
        if not getattr(config, name):
            raise UserError(f"{name}: at least one is needed, such as {usual}")
    remembers = config.memory or any(protocol.memory for protocol in config.protocols)
    at_input = [str(spec) for spec in specs(config) if spec.at_input]
    if remembers and at_input:
        raise UserError(
            f"memory needs an encoding in attention, such as pia or rope; {at_input[0]} is added "
            "at the input, so the memory would have old positions"
        )


def _check_positions(config: LmConfig, *lengths: int) -> None:
    """Raise early if a table of positions is shorter than a window."""
    for spec in specs(config):
        rows = getattr(spec, "to", None) or getattr(spec, "length", None)
        if rows is not None and rows < max(lengths):
            raise irpe.IrpeError(
                f"{spec} has {rows} rows, but windows have up to {max(lengths)} positions: "
                f"use a longer table, or interpolate=left,to={max(lengths)}"
            )


def _held(
    config: LmConfig, accelerator: Accelerator, tokens: Tokens, stream: np.ndarray, length: int
) -> Held:
    longest = max(protocol.length or length for protocol in config.protocols)
    kept = len(stream) if config.eval_tokens is None else config.eval_tokens + 1
    if kept <= longest < len(stream):
        raise UserError(f"eval_tokens: {config.eval_tokens} are less than a window of {longest}")
    return Held(config, accelerator, stream[:kept], tokens.byte_counts, length)
