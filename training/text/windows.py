"""Windows of a stream of tokens, as batches for a language model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# The label of a position that has no loss, as in torch's cross entropy.
IGNORE = -100


@dataclass
class TextBatch:
    """B windows of L tokens, each tensor [B, L] int64.

    Attributes:
        position_ids: where each token stands in its text, strictly increasing along a row.
        labels: the true next token of each token, already shifted: a model must not shift them
            again. ``IGNORE`` where there is no loss.
        segment_ids: number of the segment that a token belongs to, counted along the row.
        reset: a model that keeps a memory from batch to batch must forget it before this one.
            Where False, row b continues row b of the batch before.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    segment_ids: Tensor
    reset: bool = True

    def to(self, device: torch.device | str) -> TextBatch:
        """Return the batch on ``device``."""
        tensors = (self.input_ids, self.position_ids, self.labels, self.segment_ids)
        return TextBatch(
            *(tensor.to(device, non_blocking=True) for tensor in tensors), reset=self.reset
        )


def read(stream: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return the tokens at ``places`` as int64, ``IGNORE`` for the place after the last."""
    tokens = stream[np.minimum(places, len(stream) - 1)].astype(np.int64)
    return np.where(places < len(stream), tokens, IGNORE)


def windows(
    stream: np.ndarray, starts: np.ndarray, length: int, *, reset: bool = True
) -> TextBatch:
    """Return the windows of ``length`` tokens that begin at ``starts`` [B].

    Positions count from the start of a window. The last label of a window is the first token of
    the text behind it, or ``IGNORE`` where the stream ends.
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
    """Return the batch of the tokens at ``places`` [B, L] of the stream, told their positions."""
    labels = read(stream, places + 1)
    arrays = (stream[places].astype(np.int64), positions, labels, segments)
    tensors = [torch.from_numpy(np.array(array, dtype=np.int64)) for array in arrays]
    return TextBatch(*tensors, reset=reset)
