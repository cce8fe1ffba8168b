"""The task of train_lm.py: windows of text, their loss, and scores under stated protocols."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from models.text import CausalLM, Kept, Memory
from training.plan import Step
from training.run import Task
from training.text.options import ProtocolConfig
from training.text.protocols import Score, ScoringPlan, score
from training.text.staged import TextPlan
from training.text.windows import IGNORE, TextBatch


@dataclass(frozen=True)
class Part:
    """A batch for one forward pass: which of a step's passes it is, and its scored tokens."""

    number: int
    batch: TextBatch
    count: int


def tokens_of(windows: float, length: int) -> int:
    """Tokens of a memory that is given in windows of ``length``; at least one."""
    return max(1, round(windows * length))


class Held:
    """A text to score models on, under several protocols.

    Args:
        stream: its tokens. byte_counts: bytes of each token there is.
        length: of a window, where a protocol does not say. batch_size: of windows, or stripes.
        memory: of models that have one, in windows.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        stream: np.ndarray,
        byte_counts: np.ndarray,
        protocols: Sequence[ProtocolConfig],
        *,
        length: int,
        batch_size: int,
        memory: float = 1.0,
    ) -> None:
        self.accelerator, self.byte_counts, self.memory = accelerator, byte_counts, memory
        shards = {"shard": accelerator.process_index, "shards": accelerator.num_processes}
        self.plans = [
            ScoringPlan(stream, protocol, length=length, batch_size=batch_size, **shards)
            for protocol in protocols
        ]

    @torch.no_grad()
    def score(self, model: CausalLM, plan: ScoringPlan) -> Score:
        """Score the text; each process reads its own part of it, and all get the sums."""
        device, training = self.accelerator.device, model.training
        memory = plan.length, tokens_of(self.memory, plan.length)
        reader = model.reader(*memory) if plan.memory else model.reader()
        model.eval()
        with self.accelerator.autocast():
            own = score(reader, plan, self.byte_counts, device)
        model.train(training)
        sums = torch.tensor([own.nats, own.tokens, own.bytes], dtype=torch.float64, device=device)
        nats, tokens, size = self.accelerator.reduce(sums, "sum").tolist()
        return Score(plan.label, nats, int(tokens), int(size))

    def figures(self, model: CausalLM, plan: ScoringPlan) -> dict[str, Any]:
        """Return ``loss`` (nats per token), ``bits_per_byte`` and what they were scored under."""
        record = self.score(model, plan).record()
        return {"loss": record.pop("nats_per_token"), **record}


class Language(Task):
    """The functions that :func:`training.run.train` asks of a task.

    Args:
        plan: of all steps. stream: tokens to train on. held: what to evaluate on.
        steps_per_epoch: of the loop. accumulate: passes of a step.
        memory: what a model remembers from step to step, in windows; 0: nothing.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        plan: TextPlan,
        stream: np.ndarray,
        held: Held,
        *,
        steps_per_epoch: int,
        accumulate: int = 1,
        memory: float = 0.0,
    ) -> None:
        self.accelerator, self.plan, self.stream, self.held = accelerator, plan, stream, held
        self.steps_per_epoch, self.accumulate, self.memory = steps_per_epoch, accumulate, memory
        self.states: list[Memory | None] = [None] * accumulate

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Part]:
        """Yield this process's parts of the steps of an epoch, without the first ``skip``."""
        first, shards = epoch * self.steps_per_epoch, self.accelerator.num_processes
        for at in range(skip, self.steps_per_epoch * self.accumulate):
            step, number = divmod(at, self.accumulate)
            shard = self.accelerator.process_index * self.accumulate + number
            batch = self.plan.batch(self.stream, first + step, shard, shards * self.accumulate)
            count = int((batch.labels != IGNORE).sum())
            yield Part(number, batch.to(self.accelerator.device), count)

    def loss(self, model: nn.Module, batch: Part, step: int) -> Step:
        """Cross entropy of the true next tokens, where there is one that counts."""
        text = batch.batch
        if self.memory:
            state = None if text.reset else self.states[batch.number]
            if state is None:
                inner: CausalLM = self.accelerator.unwrap_model(model)
                length = text.input_ids.shape[1]
                state = inner.memory(length, tokens_of(self.memory, length))
            logits, self.states[batch.number] = model(text.input_ids, state=state)
        else:
            # Positions that count from 0 need not be looked at, nor kept apart for each row.
            placed = self.plan.segments.method not in ("none", "full")
            logits = model(text.input_ids, text.position_ids if placed else None)
        labels = text.labels.flatten()
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=IGNORE)
        return Step(loss, batch.count, units=text.input_ids.numel())

    def evaluate(self, models: list[nn.Module]) -> list[dict[str, Any]]:
        """Return the figures of each model, held out, under the first protocol."""
        return [self.held.figures(model, self.held.plans[0]) for model in models]  # type: ignore[arg-type]

    def carried(self) -> Any:
        """Return what layers remember of the rows of all processes, in the plan's order."""
        if not self.memory or any(state is None for state in self.states):
            return None
        first = self.states[0]
        assert first is not None
        return {
            "layers": [self._gathered(at) for at in range(len(first.layers))],
            "positions": first.positions.cpu(),
            "block": first.block,
            "anew": first.anew,
        }

    def restore(self, carried: Any) -> None:
        if carried is None or not self.memory:
            return
        shards = self.accelerator.num_processes * self.accumulate
        first = self.accelerator.process_index * self.accumulate
        device = self.accelerator.device
        for number in range(self.accumulate):
            layers = tuple(
                Kept(inputs=rows.chunk(shards)[first + number].to(device))
                for rows in carried["layers"]
            )
            self.states[number] = Memory(
                layers,
                carried["positions"].to(device),
                block=carried["block"],
                size=tokens_of(self.memory, carried["block"]),
                anew=carried["anew"],
            )

    def skipped(self) -> None:
        """What was remembered in a step that was left out is not a number; begin anew."""
        self.states = [None] * self.accumulate

    def _gathered(self, layer: int) -> Tensor:
        """What a layer remembers, in the order of (process, part, row): that of the plan."""
        own = torch.stack([state.layers[layer].inputs for state in self.states])  # type: ignore
        return self.accelerator.gather(own).flatten(0, 1).cpu()
