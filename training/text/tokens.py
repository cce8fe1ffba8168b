"""Text into numbers: bytes, or byte pairs found in the training text; and back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from training.errors import UserError
from training.text.corpus import Document
from training.text.options import TextConfig

# Characters that are encoded at once: an encoding takes a hundred times the memory of its text.
_PIECE = 1 << 20


class Tokens(Protocol):
    """A reversible code of text.

    Attributes:
        vocab_size: numbers lie below it.
        byte_counts: [vocab_size] int64, bytes of UTF-8 that each token stands for.
    """

    vocab_size: int
    byte_counts: np.ndarray

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, ids: Iterable[int]) -> str: ...


class ByteTokens:
    """Each byte of UTF-8 is a token."""

    vocab_size = 256
    byte_counts = np.ones(256, dtype=np.int64)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(number) for number in ids).decode("utf-8", errors="replace")


class PairTokens:
    """A byte-level byte pair encoding of the ``tokenizers`` package."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        whole = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for token, number in vocabulary.items():
            # Elsewhere than in added tokens, a character stands for one byte.
            counts[number] = len(token.encode("utf-8")) if token in whole else len(token)
        self.byte_counts = counts

    def encode(self, text: str) -> np.ndarray:
        pieces = [
            np.array(self.tokenizer.encode(piece, add_special_tokens=False).ids, dtype=np.int64)
            for piece in _pieces(text)
        ]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode([int(number) for number in ids], skip_special_tokens=False)


def make_tokens(
    config: TextConfig, documents: Iterable[Document], folder: Path | None = None
) -> Tokens:
    """Return the code that ``config`` asks for.

    Byte pairs are found in ``documents``, those of training, and kept in ``folder`` as
    ``bpe-SIZE.json``; if that file is there already, it is read.
    """
    if config.tokens == "bytes":
        return ByteTokens()
    if config.tokenizer is not None:
        return read_pairs(Path(config.tokenizer))
    path = None if folder is None else folder / f"bpe-{config.vocab_size}.json"
    if path is not None and path.exists():
        return read_pairs(path)
    tokens = find_pairs(documents, config.vocab_size)
    if path is not None:
        tokens.tokenizer.save(str(path))
    return tokens


def find_pairs(documents: Iterable[Document], vocab_size: int) -> PairTokens:
    """Find the byte pairs that are frequent in ``documents``, to ``vocab_size`` tokens in all.

    A short text may not have so many. Raises :class:`UserError` for less than the 256 bytes.
    """
    tokenizers = _tokenizers()
    if not 256 <= vocab_size <= 1 << 20:
        raise UserError(
            f"data.vocab_size: {vocab_size} is out of range; at least 256, the bytes themselves"
        )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    pieces = (piece for document in documents for piece in _pieces(document.text))
    tokenizer.train_from_iterator(pieces, trainer)
    return PairTokens(tokenizer)


def read_pairs(path: Path) -> PairTokens:
    """Read a ``tokenizer.json``. Raises :class:`UserError` unless it encodes bytes, losslessly."""
    tokenizers = _tokenizers()
    try:
        content = path.read_text(encoding="utf-8")
        layout = json.loads(content)
        tokenizer = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"data.tokenizer: cannot read {str(path)!r}: {error}") from error
    before = layout.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    lossless = layout.get("normalizer") is None and byte_level
    if not lossless or any(step.get("add_prefix_space") for step in byte_level):
        raise UserError(
            f"data.tokenizer: {str(path)!r} is not a byte-level encoding that leaves the text "
            "as it is (pre_tokenizer ByteLevel, no normalizer, no prefix space), so bits per byte "
            "have no meaning for it"
        )
    return PairTokens(tokenizer)


def encode(
    documents: Iterable[Document], tokens: Tokens, separator: str = "", path: Path | None = None
) -> np.ndarray:
    """Return all documents as one stream of tokens, with ``separator`` between two of them.

    The stream has the smallest unsigned type that holds the vocabulary. With ``path`` it is
    written there, document by document, and mapped into memory. Raises :class:`UserError` where
    there is no text at all.
    """
    if path is None:
        parts = list(_parts(documents, tokens, separator))
        if not parts:
            raise UserError("there is no text to encode: all documents are empty")
        return np.concatenate(parts)
    # Under another name until it is whole.
    unfinished = path.with_name(path.name + ".part")
    try:
        with unfinished.open("wb") as file:
            for part in _parts(documents, tokens, separator):
                file.write(part.tobytes())
        os.replace(unfinished, path)
    except OSError as error:
        raise UserError(f"cannot write the tokens to {str(path)!r}: {error.strerror}") from error
    return map_stream(path, tokens)


def map_stream(path: Path, tokens: Tokens) -> np.ndarray:
    """Map a stream that :func:`encode` wrote with the same ``tokens``."""
    if not path.exists() or not path.stat().st_size:
        raise UserError(f"{str(path)!r} holds no tokens")
    return np.memmap(path, dtype=_type_of(tokens), mode="r")


def _parts(documents: Iterable[Document], tokens: Tokens, separator: str) -> Iterator[np.ndarray]:
    started = False
    for document in documents:
        ids = tokens.encode(separator + document.text if started else document.text)
        if len(ids):
            started = True
            yield ids.astype(_type_of(tokens), copy=False)


def _type_of(tokens: Tokens) -> np.dtype:
    return np.min_scalar_type(tokens.vocab_size - 1)


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text after lines."""
    start = 0
    while start < len(text):
        end = start + _PIECE
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            "data.tokens: bpe needs the tokenizers package: pip install tokenizers; "
            "data.tokens: bytes does without"
        ) from error
    return tokenizers
