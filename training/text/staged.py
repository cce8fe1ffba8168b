"""The windows of text of each training step, as a pure function of the step.

Staged training (Press, Smith, Lewis, Shortformer, ACL 2021, arXiv 2012.15832) starts with short
windows and continues with long ones, with a constant number of tokens per step; ordinary training
has one stage. Windows depend only on the step, so a resumed run reads the same windows.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.errors import UserError
from training.lm.options import LmConfig
from training.seeding import derive
from training.text.options import StageConfig
from training.text.segments import TextBatch, long_length, segment_batch, window_length, windows


@dataclass(frozen=True)
class StepRows:
    """The windows of one step.

    Attributes:
        turn: number of finished passes of the stage over the text.
        span: tokens of the text that a window is drawn from.
        starts: [B] int64, start of each row's text in the stream.
        reset: whether to drop the memory of the previous step.
    """

    stage: int
    turn: int
    length: int
    span: int
    starts: np.ndarray
    reset: bool


class TextPlan:
    """The windows of every step of a run.

    Each stage reads the text in turns. A turn reads the first ``steps_per_turn x budget`` tokens of
    the stream once, and leaves out the rest, which is shorter than a step. Each stage starts with a
    new turn.

    With order "shuffled", windows are disjoint, and their order is random from (seed, stage, turn).
    With "stripes", for models with a memory, the text has one stripe for each row of the batch, and
    row b of a step continues row b of the previous step. With segments, each window is drawn from a
    longer text of ``span`` tokens, so a turn has fewer steps.

    Raises:
        UserError: if lengths do not divide the budget, stages are not in order, or the text is
            shorter than a window or a step.
    """

    def __init__(self, tokens: int, config: LmConfig) -> None:
        self.tokens, self.budget, self.seed = tokens, config.budget, config.seed
        self.order, self.segments, stages = config.order, config.segments, config.stages
        self.steps = config.epochs * config.steps_per_epoch
        if self.order == "stripes" and self.segments.method != "none":
            raise UserError(
                f"segments.method: {self.segments.method} is not allowed with order: stripes; use "
                "segments.method: none or order: shuffled"
            )
        self.ends = _ends(stages, self.steps)
        self._picked = tuple(stage.length for stage in stages)
        self.lengths = tuple(window_length(self.segments, length) for length in self._picked)
        self.spans = tuple(long_length(self.segments, length) for length in self._picked)
        _check_sizes(tokens, self.budget, self.lengths, self.spans)

    def batch_size(self, stage: int) -> int:
        """Return the number of rows of a step of the stage, in all processes."""
        return self.budget // self.lengths[stage]

    def steps_per_turn(self, stage: int) -> int:
        """Return the number of steps of a turn of the stage."""
        # The last token can only be a label.
        return (self.tokens - 1) // (self.batch_size(stage) * self.spans[stage])

    def at(self, step: int) -> StepRows:
        """Return the windows of a step, of all processes."""
        stage = next(number for number, end in enumerate(self.ends) if step < end)
        begin = self.ends[stage - 1] if stage else 0
        per_turn, rows = self.steps_per_turn(stage), self.batch_size(stage)
        turn, within = divmod(step - begin, per_turn)
        if self.order == "stripes":
            numbers = np.arange(rows) * per_turn + within
        else:
            seed = derive(self.seed, "order", stage, turn)
            numbers = _order(seed, per_turn * rows)[within * rows : (within + 1) * rows]
        span = self.spans[stage]
        reset = self.order == "shuffled" or within == 0
        return StepRows(stage, turn, self.lengths[stage], span, numbers * span, reset)

    def batch(self, stream: np.ndarray, step: int, shard: int = 0, shards: int = 1) -> TextBatch:
        """Return one of ``shards`` equal parts of the batch of a step.

        A part is for one of the accumulated batches of one process. With stripes, a part has the
        same stripes in all steps.
        """
        rows = self.at(step)
        self.check_shards(shards)
        size = len(rows.starts) // shards
        starts = rows.starts[shard * size : (shard + 1) * size]
        if self.segments.method == "none":
            return windows(stream, starts, rows.length, reset=rows.reset)
        seeds = [
            derive(self.seed, "segments", rows.stage, rows.turn, int(start)) for start in starts
        ]
        return segment_batch(stream, starts, self._picked[rows.stage], self.segments, seeds)

    def check_shards(self, shards: int) -> None:
        """Raise :class:`UserError` unless every stage's batch divides into ``shards`` parts."""
        for stage, length in enumerate(self.lengths):
            if self.batch_size(stage) % shards:
                raise UserError(
                    f"budget: {self.budget} tokens a step are {self.batch_size(stage)} windows of "
                    f"{length}, which do not divide into {shards} processes x accumulated batches"
                )


def _ends(stages: Sequence[StageConfig], steps: int) -> tuple[int, ...]:
    """Return the step before which each stage ends."""
    ends = []
    for stage in stages:
        until = steps if stage.until is None else stage.until
        if until >= 1 and until != int(until):
            raise UserError(f"stages: until: {until} is neither below 1 nor a whole step")
        ends.append(round(until * steps) if until < 1 else int(until))
    rising = all(before < after for before, after in itertools.pairwise([0, *ends]))
    if not rising or ends[-1] != steps:
        raise UserError(
            f"stages: they end at steps {', '.join(map(str, ends))} of {steps}; each must end "
            "after the one before it, and the last, with until: null, at the last step"
        )
    return tuple(ends)


def _check_sizes(
    tokens: int, budget: int, lengths: tuple[int, ...], spans: tuple[int, ...]
) -> None:
    for length in lengths:
        if length < 1 or budget < length or budget % length:
            raise UserError(
                f"stages: a length of {length} does not divide the budget of {budget} tokens a step"
            )
    if tokens <= max(spans):
        raise UserError(
            f"the text has {tokens} tokens, too few for a window of {max(spans)} and the token "
            "after it; give more text or a shorter window"
        )
    need = max(budget // length * span for length, span in zip(lengths, spans, strict=True))
    if tokens <= need:
        raise UserError(
            f"the text has {tokens} tokens, too few for a step of {need} and the token after it; "
            "give more text or a smaller budget"
        )


@functools.lru_cache(maxsize=4)
def _order(seed: int, number: int) -> np.ndarray:
    order = np.random.default_rng(seed).permutation(number)
    order.flags.writeable = False
    return order
