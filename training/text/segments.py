"""Windows of a stream of tokens, plain or of segments that keep their positions.

With segments of a text of Le tokens, windows of Lt tokens have distances up to Le - 1, at the cost
of Lt.
Sources: Karypis, McAuley, Karypis, Extending Input Contexts of Language Models through Training on
Segmented Sequences, NAACL Findings 2024, arXiv 2310.14633 (chunk, prefix); Ruoss et al., Randomized
Positional Encodings, ACL 2023 (randompos); Zhu et al., PoSE, ICLR 2024 (content: skip).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.data.loaders import Movable
from training.errors import UserError
from training.text.options import SegmentConfig

# The label of a position without loss, as in torch's cross entropy.
IGNORE = -100


@dataclass
class TextBatch(Movable):
    """B windows of L tokens, each tensor [B, L] int64.

    Attributes:
        input_ids: the tokens.
        position_ids: positions of the tokens in their text, strictly increasing in a row.
        labels: the next token of each token, already shifted; ``IGNORE``: no loss.
        segment_ids: index of the segment of each token in its row.
        reset: whether a model with a memory must clear it before this batch. If False, row b
            continues row b of the previous batch.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    segment_ids: Tensor
    reset: bool = True


def windows(
    stream: np.ndarray, starts: np.ndarray, length: int, *, reset: bool = True
) -> TextBatch:
    """Return the windows of ``length`` tokens that start at ``starts`` [B].

    Positions are relative to the window. The last label is the token after the window, or
    ``IGNORE`` at the end of the stream.
    """
    places = starts[:, None] + np.arange(length)
    positions = np.broadcast_to(np.arange(length), places.shape)
    zeros = np.zeros(places.shape, dtype=np.int64)
    return make_batch(stream, places, positions, zeros, reset=reset)


def make_batch(
    stream: np.ndarray,
    places: np.ndarray,
    positions: np.ndarray,
    segments: np.ndarray,
    *,
    reset: bool = True,
) -> TextBatch:
    """Return the batch of the tokens at indices ``places`` [B, L], with their positions."""
    after = stream[np.minimum(places + 1, len(stream) - 1)].astype(np.int64)
    labels = np.where(places + 1 < len(stream), after, IGNORE)
    arrays = (stream[places].astype(np.int64), positions, labels, segments)
    tensors = [torch.from_numpy(np.array(array, dtype=np.int64)) for array in arrays]
    return TextBatch(*tensors, reset=reset)


@dataclass(frozen=True)
class Picks:
    """The tokens of one row, each array [L] int64.

    Attributes:
        places: indices of the tokens in the long text.
        positions: positions of the tokens for the model.
        segments: index of the segment of each token.
        scored: [L] bool, whether a token has a loss.
    """

    places: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    scored: np.ndarray


def long_length(config: SegmentConfig, length: int) -> int:
    """Return the number of tokens of the text that a window of ``length`` is drawn from.

    Raises:
        UserError: if options contradict each other or the length.
    """
    if config.method == "none":
        return length
    long = config.long_length
    if long is None:
        raise UserError(f"segments.long_length is not set, and method {config.method} needs it")
    if long < length:
        raise UserError(f"segments.long_length: {long} is below the window's {length} tokens")
    if config.content == "skip" and config.method != "chunk":
        raise UserError(f"segments.content: skip needs method chunk, not {config.method}")
    if config.method in ("chunk", "prefix"):
        size = _segment(config, length)
        grid = config.method == "chunk" and config.placement == "grid"
        if grid and long % size:
            raise UserError(
                f"segments.placement: grid needs a long_length that is a multiple of the chunk's "
                f"{size} tokens, not {long}"
            )
    return long


def window_length(config: SegmentConfig, length: int) -> int:
    """Return the number of tokens of a row: ``length``; for method full, the long length."""
    return long_length(config, length) if config.method == "full" else length


def pick(config: SegmentConfig, length: int, generator: np.random.Generator) -> Picks:
    """Draw the tokens of one window of ``length`` from a long text."""
    long, full = long_length(config, length), np.arange(window_length(config, length))
    same, all_scored = np.zeros_like(full), np.ones(len(full), dtype=bool)
    if config.method in ("none", "full"):
        return Picks(full, full, same, all_scored)
    if config.method == "prefix":
        return _prefix(config, length, generator)
    contiguous = full + generator.integers(long - length, endpoint=True)
    if config.method == "randompos":
        positions = np.sort(generator.choice(long, length, replace=False))
        return Picks(contiguous, positions, same, all_scored)
    size = _segment(config, length)
    place = _on_grid if config.placement == "grid" else _anywhere
    starts = place(long, length // size, size, generator)
    positions = _spread(starts, size)
    places = contiguous if config.content == "skip" else positions
    return Picks(places, positions, full // size, all_scored)


def segment_batch(
    stream: np.ndarray,
    starts: np.ndarray,
    length: int,
    config: SegmentConfig,
    seeds: Sequence[int],
) -> TextBatch:
    """Return a batch with one window from each of the long texts that start at ``starts`` [B].

    A row depends only on its seed. Positions are relative to the long text. Labels are the next
    tokens of the long text, also at the end of a segment; ``IGNORE`` in a prefix and at the end of
    the stream.
    """
    rows = [pick(config, length, np.random.default_rng(seed)) for seed in seeds]
    places = np.stack([row.places for row in rows]) + starts[:, None]
    positions = np.stack([row.positions for row in rows])
    batch = make_batch(stream, places, positions, np.stack([row.segments for row in rows]))
    for labels, row in zip(batch.labels, rows, strict=True):
        labels[~row.scored] = IGNORE
    return batch


def _segment(config: SegmentConfig, length: int) -> int:
    """Return the number of tokens of a chunk or suffix."""
    number = round(1 / config.alpha) if config.alpha > 0 else 0
    if number < 1 or abs(number * config.alpha - 1) > 1e-6:
        raise UserError(f"segments.alpha: {config.alpha} is not one over a whole number")
    if length % number:
        raise UserError(
            f"segments.alpha: {config.alpha} of a window of {length} tokens is not a whole number"
        )
    return length // number


def _prefix(config: SegmentConfig, length: int, generator: np.random.Generator) -> Picks:
    long, size = long_length(config, length), _segment(config, length)
    before = length - size
    start = generator.integers(before, long - size, endpoint=True)
    if config.prefix == "tokens":
        prefix, segments = np.sort(generator.choice(start, before, replace=False)), np.zeros(before)
    else:
        prefix = _spread(_anywhere(start, before // size, size, generator), size)
        segments = np.arange(before) // size
    places = np.concatenate([prefix, start + np.arange(size)])
    last = segments[-1] + 1 if before else 0
    segments = np.concatenate([segments, np.full(size, last)]).astype(np.int64)
    return Picks(places, places, segments, np.arange(length) >= before)


def _anywhere(long: int, number: int, size: int, generator: np.random.Generator) -> np.ndarray:
    """Return the random starts of ``number`` disjoint segments."""
    gaps = generator.integers(long - number * size, size=number, endpoint=True)
    return np.sort(gaps) + size * np.arange(number)


def _on_grid(long: int, number: int, size: int, generator: np.random.Generator) -> np.ndarray:
    return np.sort(generator.choice(long // size, number, replace=False)) * size


def _spread(starts: np.ndarray, size: int) -> np.ndarray:
    return (starts[:, None] + np.arange(size)).reshape(-1)
