"""The task of train_lm.py: windows of text, their loss, and scores under several protocols."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from models.text import CausalLM, Kept, Memory, generate
from training.data.digest import Digest, array_digest
from training.lm.model import encoding_name
from training.lm.options import LmConfig
from training.report import LANGUAGE
from training.run_directory import RunDirectory
from training.seeding import derive
from training.task import Step, Task, evaluating
from training.text.protocols import Score, ScoringPlan, score
from training.text.segments import IGNORE, TextBatch
from training.text.staged import TextPlan
from training.text.tokens import Tokens

PROMPT = 64  # tokens of held-out text before a sample


@dataclass(frozen=True)
class Part:
    """A batch for one forward pass: index of the pass in its step, batch, and scored tokens."""

    number: int
    batch: TextBatch
    count: int


def tokens_of(windows: float, length: int) -> int:
    """Return the tokens of a memory of ``windows`` windows of ``length`` tokens, at least 1."""
    return max(1, round(windows * length))


class Held:
    """A text to score models on, under several protocols."""

    def __init__(
        self,
        config: LmConfig,
        accelerator: Accelerator,
        stream: np.ndarray,
        byte_counts: np.ndarray,
        length: int,
    ) -> None:
        self.accelerator, self.byte_counts = accelerator, byte_counts
        self.memory = config.memory or 1.0  # in windows
        shards = {"shard": accelerator.process_index, "shards": accelerator.num_processes}
        options = {"length": length, "batch_size": config.eval_batch_size, **shards}
        self.plans = [ScoringPlan(stream, protocol, **options) for protocol in config.protocols]

    def score(self, model: CausalLM, plan: ScoringPlan) -> Score:
        """Score the text; each process reads a part, and all processes get the sums."""
        device = self.accelerator.device
        memory = plan.length, tokens_of(self.memory, plan.length)
        reader = model.reader(*memory) if plan.memory else model.reader()
        with evaluating(model), self.accelerator.autocast():
            own = score(reader, plan, self.byte_counts, device)
        sums = torch.tensor([own.nats, own.tokens, own.bytes], dtype=torch.float64, device=device)
        nats, tokens, size = self.accelerator.reduce(sums, "sum").tolist()
        return Score(plan.label, nats, int(tokens), int(size))

    def metrics(self, model: CausalLM, plan: ScoringPlan) -> dict[str, Any]:
        """Return ``loss`` (nats per token), ``bits_per_byte`` and the protocol."""
        record = self.score(model, plan).record()
        return {"loss": record.pop("nats_per_token"), **record}


class Language(Task):
    """Training and evaluation of a language model."""

    best, unit, panels = "bits_per_byte", "tokens", LANGUAGE
    line = (
        "train loss {train_loss:.3f}",
        "held out {bits_per_byte:.4f} bits per byte ({protocol})",
        "averaged weights {ema_bits_per_byte:.4f}",
    )
    result = "held-out {bits_per_byte:.4f} bits per byte ({protocol}, {tokens:,} tokens)"

    def __init__(
        self,
        config: LmConfig,
        accelerator: Accelerator,
        model: CausalLM,
        held: Held,
        tokens: Tokens,
        plan: TextPlan | None,
        streams: Sequence[np.ndarray],
    ) -> None:
        spec = encoding_name(config)
        about = {"model": "lm", "encoding": spec}
        super().__init__(config, accelerator, model, f"lm-{spec}-seed{config.seed}", about)
        self.held, self.tokens, self.plan, self.streams = held, tokens, plan, streams
        self.steps, self.accumulate = config.steps_per_epoch, config.grad_accum_steps
        self.memory = config.memory
        self.note = f"{len(streams[0]):,} tokens to train on, {len(streams[-1]):,} held out"
        self.states: list[Memory | None] = [None] * self.accumulate

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Part]:
        """Yield this process's batches of an epoch, without the first ``skip``."""
        first, shards = epoch * self.steps, self.accelerator.num_processes
        for at in range(skip, self.steps * self.accumulate):
            step, number = divmod(at, self.accumulate)
            shard = self.accelerator.process_index * self.accumulate + number
            batch = self.plan.batch(self.streams[0], first + step, shard, shards * self.accumulate)
            count = int((batch.labels != IGNORE).sum())
            yield Part(number, batch.to(self.accelerator.device), count)

    def loss(self, model: nn.Module, batch: Part, step: int) -> Step:
        """Compute the cross entropy of the scored next tokens."""
        text = batch.batch
        if self.memory:
            state = None if text.reset else self.states[batch.number]
            if state is None:
                inner: CausalLM = self.accelerator.unwrap_model(model)
                length = text.input_ids.shape[1]
                state = inner.memory(length, tokens_of(self.memory, length))
            logits, self.states[batch.number] = model(text.input_ids, state=state)
        else:
            # Default positions need no checks, and are shared by all rows.
            placed = self.plan.segments.method not in ("none", "full")
            logits = model(text.input_ids, text.position_ids if placed else None)
        labels = text.labels.flatten()
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=IGNORE)
        return Step(loss, batch.count, units=text.input_ids.numel())

    def evaluate(self, models: list[nn.Module]) -> list[dict[str, Any]]:
        """Return the held-out results of each model under the first protocol."""
        return [self.held.metrics(model, self.held.plans[0]) for model in models]

    def report(self) -> list[dict[str, Any]]:
        """Score the model under every protocol; print and return the results."""
        return self._scores(self.model)

    def digest(self) -> Digest:
        return array_digest(train_tokens=self.streams[:1], held_out_tokens=self.streams[1:])

    def finish(self, directory: RunDirectory | None, model: nn.Module) -> None:
        scores = self._scores(model)
        if directory is None:
            return
        directory.write_json("scores.json", scores)
        if self.config.sample:
            text = self._sample(model)
            directory.write_text("sample.txt", text + "\n")
            print(f"a sample, after {PROMPT} tokens of held-out text:\n{text}\n")

    def _scores(self, model: nn.Module) -> list[dict[str, Any]]:
        scores = [self.held.score(model, plan) for plan in self.held.plans]
        width = max(len(score.protocol) for score in scores)
        for found in scores if self.accelerator.is_main_process else ():
            print(
                f"{found.protocol:{width}}  {found.bits_per_byte:.4f} bits per byte, "
                f"perplexity {found.perplexity:.2f} ({found.tokens:,} tokens)"
            )
        return [found.record() for found in scores]

    def _sample(self, model: CausalLM) -> str:
        """Return the start of the held-out text and the model's continuation."""
        config, length = self.config, self.config.stages[-1].length
        prompt = self.streams[-1][: min(PROMPT, length // 2 or 1)].astype(np.int64)
        state, count = None, config.sample
        if config.memory:
            state = model.memory(length, tokens_of(config.memory, length))
        else:
            count = min(count, length - len(prompt))
        with evaluating(model), self.accelerator.autocast():
            ids = generate(
                model,
                torch.from_numpy(prompt)[None].to(self.accelerator.device),
                count,
                temperature=config.temperature,
                state=state,
                generator=torch.Generator().manual_seed(derive(config.seed, "sample")),
            )
        return self.tokens.decode([*prompt.tolist(), *ids[0].tolist()])

    def carried(self) -> Any:
        """Return the memory of the rows of all processes, in the plan's order."""
        if not self.memory or any(state is None for state in self.states):
            return None
        first = self.states[0]
        assert first is not None
        return {
            "layers": [self._gathered(at) for at in range(len(first.layers))],
            "positions": first.positions.cpu(),
            "block": first.block,
            "renumber": first.renumber,
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
                renumber=carried["renumber"],
            )

    def skipped(self) -> None:
        """Drop the memory, which is not finite after a skipped step."""
        self.states = [None] * self.accumulate

    def _gathered(self, layer: int) -> Tensor:
        """Return the memory of a layer, in the plan's order (process, part, row)."""
        own = torch.stack([state.layers[layer].inputs for state in self.states])
        return self.accelerator.gather(own).flatten(0, 1).cpu()
