"""The task of finding answers: readings of questions, the loss of both ends, SQuAD's scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from training.data.loaders import EpochSampler
from training.plan import Step
from training.run import Task
from training.text.answers import (
    Found,
    Reading,
    ReadingBatch,
    best_spans,
    exact_match,
    f1,
    pad,
)
from training.text.questions import Question


class Answer(Task):
    """The functions that :func:`training.run.train` asks of a task.

    Args:
        train, held: readings; those of a held-out question are all evaluated by one process.
        questions: the held-out ones. padding: token behind a short reading.
        batch_size, eval_batch_size: of a forward pass of this process.
        longest: tokens of an answer, at most.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        train: Sequence[Reading],
        held: Sequence[Reading],
        questions: Sequence[Question],
        *,
        padding: int,
        batch_size: int,
        eval_batch_size: int,
        longest: int,
        seed: int,
    ) -> None:
        self.accelerator, self.train, self.questions = accelerator, train, questions
        self.padding, self.longest = padding, longest
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        rank, world = accelerator.process_index, accelerator.num_processes
        self.held = [reading for reading in held if reading.question % world == rank]
        self.sampler = EpochSampler(
            len(train), seed=seed, shuffle=True, even=True, rank=rank, world=world
        )
        # Where some have none, the first mark competes with the spans.
        self.some_unanswered = not all(question["answers"]["text"] for question in questions)

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size

    def batches(self, epoch: int, skip: int = 0) -> Iterator[ReadingBatch]:
        """Yield the training batches of an epoch, without the first ``skip``."""
        self.sampler.set_epoch(epoch)
        order = [index for _, index, _ in self.sampler]
        for number in range(skip, len(self)):
            begin = number * self.batch_size
            chosen = [self.train[index] for index in order[begin : begin + self.batch_size]]
            yield pad(chosen, self.padding).to(self.accelerator.device)

    def loss(self, model: nn.Module, batch: ReadingBatch, step: int) -> Step:
        """Mean of the cross entropies of the first and the last token."""
        start, end = model(batch.tokens, batch.types, batch.seen)
        loss = _loss(start, end, batch).mean()
        found = ((start.argmax(1) == batch.start) & (end.argmax(1) == batch.end)).sum()
        return Step(loss, len(batch.readings), {"both_ends": found})

    @torch.no_grad()
    def evaluate(self, models: list[nn.Module]) -> list[dict[str, float]]:
        """Return ``loss``, ``exact`` and ``f1`` (shares) and ``count`` of each model, held out."""
        return [self._evaluate(model) for model in models]

    def answers(self, model: nn.Module) -> dict[str, str]:
        """Return the answers to all held-out questions, by their ids."""
        own, _ = self._answers(model)
        merged: dict[str, str] = {}
        for part in gather_object([own]):
            merged.update(part)
        return merged

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        answers, loss = self._answers(model)
        sums = torch.tensor([loss, len(self.held), 0, 0, len(answers)], dtype=torch.float64)
        by_id = {str(question["id"]): question["answers"]["text"] for question in self.questions}
        for name, answer in answers.items():
            sums[2] += exact_match(answer, by_id[name])
            sums[3] += f1(answer, by_id[name])
        reduced = self.accelerator.reduce(sums.to(self.accelerator.device), "sum").tolist()
        loss, readings, exact, overlap, count = reduced
        shares = {"exact": exact / count, "f1": overlap / count}
        return {"loss": loss / readings, **shares, "count": int(count)}

    @torch.no_grad()
    def _answers(self, model: nn.Module) -> tuple[dict[str, str], float]:
        """This process's answers by their questions' ids, and the sum of the readings' losses."""
        training, total = model.training, 0.0
        model.eval()
        best: dict[int, Found] = {}
        for begin in range(0, len(self.held), self.eval_batch_size):
            readings = self.held[begin : begin + self.eval_batch_size]
            batch = pad(readings, self.padding).to(self.accelerator.device)
            with self.accelerator.autocast():
                start, end = model(batch.tokens, batch.types, batch.seen)
            total += float(_loss(start, end, batch).double().sum())
            for reading, found in zip(
                readings, best_spans(start, end, batch, self.longest), strict=True
            ):
                known = best.get(reading.question)
                if known is None or found.score > known.score:
                    best[reading.question] = found
        model.train(training)
        answers = {}
        for number, found in best.items():
            question = self.questions[number]
            none = self.some_unanswered and found.score < 0
            text = "" if none else question["context"][found.start : found.end]
            answers[str(question["id"])] = text
        return answers, total


def _loss(start: torch.Tensor, end: torch.Tensor, batch: ReadingBatch) -> torch.Tensor:
    parts = ((start, batch.start), (end, batch.end))
    losses = [F.cross_entropy(x.float(), y, reduction="none") for x, y in parts]
    return (losses[0] + losses[1]) / 2
