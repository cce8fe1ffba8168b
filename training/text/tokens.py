"""Tokenisers: bytes, or byte pairs of the training text."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from training.checkpoint import replacing
from training.errors import UserError
from training.text.corpus import Document
from training.text.options import TextConfig

# Characters to encode at once: encoding needs a hundred times the memory of the text.
_PIECE = 1 << 20
# Training of byte pairs is quadratic in the longest word: 20 s for 200,000 characters without a
# blank, less than 1 s for words of this length.
_LONG_WORD = re.compile(r"\S{4096}")


class ByteTokens:
    """Each byte of UTF-8 is a token.

    Attributes:
        vocab_size: number of tokens.
        byte_counts: [vocab_size] int64, length of each token in bytes of UTF-8.
    """

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
            # Except in added tokens, a character is one byte.
            counts[number] = len(token.encode("utf-8")) if token in whole else len(token)
        self.byte_counts = counts

    def encode(self, text: str, checked: bool = True) -> np.ndarray:
        pieces = [
            np.array(self.tokenizer.encode(piece, add_special_tokens=False).ids, dtype=np.int64)
            for piece in _pieces(text)
        ]
        ids = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)
        found, size = int(self.byte_counts[ids].sum()), len(text.encode("utf-8"))
        if checked and found != size:
            raise UserError(
                f"data.tokenizer: {size} bytes of text have tokens of {found} bytes: it loses text"
            )
        return ids

    @property
    def digest(self) -> str:
        """A digest of the tokeniser."""
        return hashlib.blake2b(self.tokenizer.to_str().encode("utf-8"), digest_size=16).hexdigest()

    def save(self, path: Path) -> None:
        with replacing(path) as temporary:
            self.tokenizer.save(str(temporary))

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode([int(number) for number in ids], skip_special_tokens=False)


Tokens = ByteTokens | PairTokens


def make_tokens(config: TextConfig, documents: Iterable[Document]) -> Tokens:
    """Return the tokeniser of a config; new byte pairs are trained on ``documents``."""
    if config.tokens == "bytes":
        return ByteTokens()
    if config.tokenizer is not None:
        return read_pairs(Path(config.tokenizer))
    return find_pairs(documents, config.vocab_size)


def find_pairs(documents: Iterable[Document], vocab_size: int) -> PairTokens:
    """Train byte pairs on ``documents``.

    Args:
        vocab_size: number of tokens, at least 256; a short text may have fewer.

    Raises:
        UserError: if ``vocab_size`` is out of range.
    """
    tokenizers = tokenizers_package("data.tokens: bpe")
    if not 256 <= vocab_size <= 1 << 20:
        raise UserError(
            f"data.vocab_size: {vocab_size} is out of range; at least 256 are needed, for all bytes"
        )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=sys.stderr.isatty(),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    pieces = (piece for document in documents for piece in _pieces(document.text))
    tokenizer.train_from_iterator(pieces, trainer)
    return PairTokens(tokenizer)


def read_pairs(path: Path) -> PairTokens:
    """Read a ``tokenizer.json`` of a byte-level encoding, without truncation, padding and dropout.

    Raises:
        UserError: if the file cannot be read, or its settings lose or change text.
    """
    tokenizers = tokenizers_package("data.tokens: bpe")
    try:
        tokenizer = uncut(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"data.tokenizer: cannot read {str(path)!r}: {error}") from error
    reason = _lossy(tokenizer, tokenizers)
    if reason is not None:
        raise UserError(
            f"data.tokenizer: {str(path)!r} is not a lossless byte-level encoding, which bits per "
            f"byte need: {reason}"
        )
    return PairTokens(tokenizer)


def uncut(tokenizer: Any) -> Any:
    """Turn off truncation, padding and dropout of a tokenizer, and return it."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    model = getattr(tokenizer, "model", None)
    if getattr(model, "dropout", None):
        model.dropout = None
    return tokenizer


def _lossy(tokenizer: Any, tokenizers: Any) -> str | None:
    """Return why a tokenizer loses or changes text, or None."""
    layout, tokens = json.loads(tokenizer.to_str()), PairTokens(tokenizer)
    if layout["model"]["type"] != "BPE":
        return f"model is {layout['model']['type']}, not BPE"
    if layout["normalizer"] is not None:
        return f"normalizer: {layout['normalizer'].get('type')} changes the text"
    alphabet = set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    if missing := alphabet - tokenizer.get_vocab().keys():
        return f"its vocabulary lacks {len(missing)} of the 256 bytes, whose text would be dropped"
    steps = json.dumps(layout["pre_tokenizer"])
    kinds = set(re.findall(r'"type": "(\w+)"', steps))
    if kinds - _LOSSLESS or '"Removed"' in steps:
        return f"pre_tokenizer: {', '.join(sorted(kinds))} can drop characters"
    # Test what no setting shows: added tokens that the decoder reads as bytes, blanks that are
    # stripped or added, ...
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    probe = " a\n".join(["b", *added, "".join(map(chr, range(0x250))), "\u4e1c \U0001f600 \t\r\n "])
    ids = tokens.encode(probe, checked=False)
    if tokens.decode(ids) == probe and tokens.byte_counts[ids].sum() == len(probe.encode()):
        return None
    return f"it changes some of its {len(added)} added tokens, or other characters"


# Steps that only split a text, unless they remove the separators.
_LOSSLESS = {"ByteLevel", "Digits", "Punctuation", "Split", "UnicodeScripts", "Sequence"}


def encode(
    documents: Iterable[Document], tokens: Tokens, separator: str = "", path: Path | None = None
) -> np.ndarray:
    """Return all documents as one stream of tokens, of the smallest unsigned dtype.

    Args:
        separator: text between two documents.
        path: a file to write the stream to and map into memory; None: keep it in memory.

    Raises:
        UserError: if there is no text.
    """
    if path is None:
        parts = list(_parts(documents, tokens, separator))
        if not parts:
            raise UserError("there is no text to encode: all documents are empty")
        return np.concatenate(parts)
    with replacing(path) as temporary, temporary.open("wb") as file:
        for part in _parts(documents, tokens, separator):
            file.write(part.tobytes())
    return map_stream(path, tokens)


def map_stream(path: Path, tokens: Tokens) -> np.ndarray:
    """Map a stream of :func:`encode`, with the same ``tokens``, into memory."""
    if not path.exists() or not path.stat().st_size:
        raise UserError(f"{str(path)!r} has no tokens")
    return np.memmap(path, dtype=_type_of(tokens), mode="r")


def _parts(documents: Iterable[Document], tokens: Tokens, separator: str) -> Iterator[np.ndarray]:
    started = False
    # The bar is shown on a terminal, after five seconds.
    for document in tqdm(
        documents, "tokens", unit=" documents", delay=5, leave=False, disable=None
    ):
        ids = tokens.encode(separator + document.text if started else document.text)
        if len(ids):
            started = True
            yield ids.astype(_type_of(tokens), copy=False)


def _type_of(tokens: Tokens) -> np.dtype:
    return np.min_scalar_type(tokens.vocab_size - 1)


def _pieces(text: str) -> Iterator[str]:
    """Yield a text in pieces, split after lines and inside very long words."""
    start = 0
    while start < len(text):
        end = start + _PIECE
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        piece, first = text[start:end], 0
        for word in _LONG_WORD.finditer(piece):
            yield piece[first : word.end()]
            first = word.end()
        if first < len(piece):
            yield piece[first:]
        start = end


def tokenizers_package(option: str) -> Any:
    """Return the ``tokenizers`` package; raise UserError with ``option`` if it is missing."""
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            f"{option} needs the tokenizers package: pip install tokenizers; "
            "data.tokens: bytes does not need it"
        ) from error
    return tokenizers
