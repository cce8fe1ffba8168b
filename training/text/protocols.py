"""Scoring of texts under a protocol; results of different protocols cannot be compared.

The loss of a token depends on the length of its context. In disjoint windows, the first tokens have
little context. A window that slides by a stride gives every token at least length - stride tokens
of context and costs length / stride times as much; sliding by one token gives the most. A model
with a memory reads every token once, in order, and passes a state. (Press, Smith, Lewis,
Shortformer, ACL 2021, arXiv 2012.15832, section 2.) Each protocol scores every token except the
first exactly once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.errors import UserError
from training.text.options import ProtocolConfig
from training.text.segments import IGNORE

# (state, tokens [B, n], positions [B, n]) -> (logits or log-probabilities [B, n, V], state).
# The state is None at the start of rows, then the result of the previous call.
Model = Callable[[Any, Tensor, Tensor], tuple[Tensor, Any]]


@dataclass
class Block:
    """Tokens for one call of the model, each tensor [B, n] int64.

    Attributes:
        tokens: rows of the text.
        positions: 0 to n - 1; with a memory, from the start of the row.
        targets: the next token; ``IGNORE`` if this call does not score it.
        fresh: whether the model starts without a state.
    """

    tokens: Tensor
    positions: Tensor
    targets: Tensor
    fresh: bool


@dataclass(frozen=True)
class Score:
    """The protocol, and sums over the scored tokens."""

    protocol: str
    nats: float
    tokens: int
    bytes: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def perplexity(self) -> float:
        """Per token: results of different vocabularies cannot be compared."""
        return math.exp(min(self.nats_per_token, 700.0))

    def record(self) -> dict[str, Any]:
        """Return the protocol and the results as a dict."""
        names = ("protocol", "nats_per_token", "bits_per_byte", "perplexity", "tokens")
        return {name: getattr(self, name) for name in names}


class ScoringPlan:
    """An iterable of the blocks of a stream to score.

    Args:
        stream: [N] tokens.
        config: the protocol.
        length: tokens of a window, if the protocol has none.
        batch_size: rows of a block. With a memory, the text is cut into this number of stripes,
            which start without a memory; 1 scores the text as a whole.
        shard: index of this part.
        shards: number of parts; the sum of all parts is the score.

    Raises:
        UserError: if the stride is outside [1, length], or the text is shorter than a window.
    """

    def __init__(
        self,
        stream: np.ndarray,
        config: ProtocolConfig,
        *,
        length: int | None = None,
        batch_size: int = 1,
        shard: int = 0,
        shards: int = 1,
    ) -> None:
        self.stream, self.batch_size, self.memory = stream, batch_size, config.memory
        self.shard, self.shards = shard, shards
        self.length = config.length or length or 0
        if self.length < 1:
            raise UserError(f"protocol.length: {config.length} is not at least 1")
        self.stride, kind = _stride(config, self.length)
        if len(stream) <= self.length:
            raise UserError(
                f"the text has {len(stream)} tokens, too few for a window of {self.length} and "
                "the token after it; give more text or a shorter window"
            )
        if self.memory and batch_size * self.length >= len(stream):
            raise UserError(
                f"{batch_size} stripes of {len(stream)} tokens are shorter than a window of "
                f"{self.length}; use a smaller eval_batch_size"
            )
        self.label = f"{kind}, window {self.length}"
        if config.memory:
            self.label += ", memory" + (f", {batch_size} stripes" if batch_size > 1 else "")

    def __iter__(self) -> Iterator[Block]:
        return self._carried() if self.memory else self._windows()

    def _windows(self) -> Iterator[Block]:
        total = len(self.stream) - 1  # targets
        number = 1 + math.ceil((total - self.length) / self.stride)
        starts = np.arange(number) * self.stride
        # Rows of a block have equal lengths. The last window may be shorter, so it is separate.
        edges = [*range(0, number - 1, self.batch_size), number - 1, number]
        blocks = list(itertools.pairwise(edges))
        for first, end in blocks[self.shard :: self.shards]:
            begins = starts[first:end]
            size = min(self.length, total - begins[0])
            places = np.arange(size)
            # The previous window has scored all tokens except the last ``stride``.
            scored = (places >= self.length - self.stride) | (begins[:, None] == 0)
            yield self._block(begins, places, scored, fresh=True)

    def _carried(self) -> Iterator[Block]:
        total = len(self.stream) - 1
        # Targets of each row, shorter rows first: a finished row reads tokens of the next one.
        short, longer = divmod(total, self.batch_size)
        counts = np.array([short] * (self.batch_size - longer) + [short + 1] * longer)
        mine = slice(self.shard, None, self.shards)
        counts, begins = counts[mine], (np.cumsum(counts) - counts)[mine]
        if not len(counts):
            return
        at = 0
        while at < counts.max():
            size = min(self.stride if at else self.length, counts.max() - at)
            places = at + np.arange(size)
            yield self._block(begins, places, places < counts[:, None], fresh=at == 0)
            at += size

    def _block(
        self, begins: np.ndarray, places: np.ndarray, scored: np.ndarray, fresh: bool
    ) -> Block:
        rows = begins[:, None] + places
        targets = np.where(scored, self.stream[rows + 1].astype(np.int64), IGNORE)
        positions = np.broadcast_to(places, rows.shape)
        arrays = (self.stream[rows], positions, targets)
        return Block(*(torch.from_numpy(np.array(part, dtype=np.int64)) for part in arrays), fresh)


@torch.no_grad()
def score(
    model: Model,
    plan: ScoringPlan,
    byte_counts: np.ndarray,
    device: torch.device | str = "cpu",
) -> Score:
    """Score the text of a plan.

    Args:
        model: a function of the blocks in order, see :data:`Model`.
        byte_counts: [V], bytes of each token.
    """
    nats, tokens, size, state = 0.0, 0, 0, None
    for block in plan:
        state = None if block.fresh else state
        inputs = (part.to(device, non_blocking=True) for part in (block.tokens, block.positions))
        logits, state = model(state, *inputs)
        scored = block.targets != IGNORE
        targets = block.targets[scored]
        chosen = logits[scored.to(device)]
        # At least float32. The softmax does not change log-probabilities.
        chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
        loss = F.cross_entropy(chosen, targets.to(device), reduction="none")
        nats += float(loss.double().sum())
        tokens += len(targets)
        size += int(byte_counts[targets.numpy()].sum())
    return Score(plan.label, nats, tokens, size)


def _stride(config: ProtocolConfig, length: int) -> tuple[int, str]:
    """Return the stride and the name of a protocol."""
    if config.kind == "sliding":
        stride = config.stride
        if stride is None or not 1 <= stride <= length:
            raise UserError(
                f"protocol.stride: {stride} is not from 1 to {length}, the length of a window"
            )
        return stride, f"sliding window, stride {stride}"
    if config.stride is not None:
        raise UserError(
            f"protocol.stride: {config.stride} needs protocol.kind: sliding, not {config.kind}"
        )
    return (length, "non-overlapping") if config.kind == "nonoverlapping" else (1, "token by token")
