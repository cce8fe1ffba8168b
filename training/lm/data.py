"""The streams of tokens that a language model is trained and scored on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from training.errors import UserError
from training.text.corpus import open_corpus
from training.text.options import TextConfig
from training.text.tokens import ByteTokens, Tokens, encode, make_tokens, map_stream

_ABOUT = "text.json"


def open_text(
    config: TextConfig, accelerator: Accelerator, *splits: str
) -> tuple[Tokens, list[np.ndarray]]:
    """Return the code, and each split's stream of tokens.

    With ``data.folder`` both are read from there, or written there by one process first. Raises
    :class:`UserError` for a folder that holds another text, and as ``open_corpus`` does.
    """
    folder = None if config.folder is None else Path(config.folder)
    with accelerator.main_process_first():
        if folder is not None:
            _claim(folder, config)
        # Bytes need not look at the text that byte pairs are found in.
        documents = () if config.tokens == "bytes" else open_corpus(config, "train")
        tokens = make_tokens(config, documents, folder)
        streams = [_stream(config, tokens, split, folder) for split in splits]
    return tokens, streams


def _stream(config: TextConfig, tokens: Tokens, split: str, folder: Path | None) -> np.ndarray:
    if folder is None:
        return encode(open_corpus(config, split), tokens, config.separator)
    size = "bytes" if isinstance(tokens, ByteTokens) else tokens.vocab_size
    path = folder / f"{split}-{size}.bin"
    if path.exists():
        return map_stream(path, tokens)
    return encode(open_corpus(config, split), tokens, config.separator, path)


def _claim(folder: Path, config: TextConfig) -> None:
    """Note which text a folder is of, or raise where it is of another one."""
    about = {k: v for k, v in dataclasses.asdict(config).items() if k != "folder"}
    path = folder / _ABOUT
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"data.folder: cannot use {str(folder)!r}: {error}") from error
    differing = [key for key in about if found.get(key) != about[key]]
    if differing:
        key = differing[0]
        raise UserError(
            f"data.folder: {str(folder)!r} is of another text: data.{key} was {found.get(key)!r}, "
            f"is {about[key]!r}; give another folder"
        )
