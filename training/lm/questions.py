"""The task of finding answers: the loss of both ends, and SQuAD's metrics."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from training.data.digest import Digest, array_digest
from training.data.loaders import Rows, batches_of
from training.lm.model import build_span_finder, encoding_name, released_config
from training.lm.options import LmConfig
from training.report import ANSWERS
from training.run_directory import RunDirectory
from training.task import ImageTask, Step, evaluating, loader_of
from training.text import answers as squad
from training.text.corpus import open_corpus
from training.text.questions import open_questions
from training.text.tokens import make_tokens


class Answer(ImageTask):
    """Training and evaluation of a model that finds spans.

    One process evaluates all readings of a held-out question.
    """

    best, lower, unit, panels = "f1", False, "texts", ANSWERS
    line = (
        "train loss {train_loss:.3f}, both ends {train_both_ends:.1f} %",
        "held out loss {loss:.3f}, exact {exact:.1f}, F1 {f1:.1f}",
        "averaged weights {ema_f1:.1f}",
    )
    result = "held-out exact match {exact:.2f}, F1 {f1:.2f} ({count} questions)"

    def __init__(self, config: LmConfig, accelerator: Accelerator) -> None:
        if config.model.pretrained is not None:
            released_config(Path(config.model.pretrained))
        options, code = config.questions, _code(config)
        rank, world = accelerator.process_index, accelerator.num_processes
        self.questions = list(open_questions(options, "validation"))
        held = squad.make_readings(self.questions, code, options)
        self.held = [reading for reading in held if reading.question % world == rank]
        train = [] if config.eval_only else open_questions(options, "train")
        self.train = squad.make_readings(train, code, options)
        # If some have no answer, spans are compared with the score of no answer.
        self.some_unanswered = not all(q["answers"]["text"] for q in self.questions)

        more = {"collate": functools.partial(squad.pad, padding=code.padding)}
        train_loader = loader_of(config, accelerator, Rows(self.train), training=True, **more)
        more |= {"rank": 0, "world": 1}  # self.held has only this process's readings
        held_loader = loader_of(config, accelerator, Rows(self.held), training=False, **more)
        spec = encoding_name(config)
        super().__init__(
            (),
            [train_loader, held_loader][config.eval_only :],
            None,
            config,
            accelerator,
            build_span_finder(config, code.vocab_size),
            f"questions-{spec}-seed{config.seed}",
            {"model": "span finder", "encoding": spec},
        )

    def batches(self, epoch: int, skip: int = 0) -> Iterator[squad.ReadingBatch]:
        for batch in batches_of(self.loaders[0], epoch, skip):
            yield batch.to(self.accelerator.device)

    def loss(self, model: nn.Module, batch: squad.ReadingBatch, step: int) -> Step:
        """Compute the mean of the cross entropies of the first and the last token."""
        start, end = model(batch.tokens, batch.types, batch.seen)
        loss = _loss(start, end, batch).mean()
        found = ((start.argmax(1) == batch.start) & (end.argmax(1) == batch.end)).sum()
        return Step(loss, len(batch.readings), {"both_ends": found})

    def evaluate(self, models: list[nn.Module]) -> list[dict[str, float]]:
        """Return the held-out ``loss``, ``exact``, ``f1`` and ``count`` of each model."""
        return [self._evaluate(model) for model in models]

    def digest(self) -> Digest:
        return array_digest(
            train_questions=(x for r in self.train for x in (r.tokens, r.spans)),
            held_out_questions=(x for r in self.held for x in (r.tokens, r.spans)),
        )

    def finish(self, directory: RunDirectory | None, model: nn.Module) -> None:
        """Write the answers to all held-out questions in the format of SQuAD's script."""
        own, _ = self._answers(model)
        parts = gather_object([own])
        if directory is not None:
            merged = {name: answer for part in parts for name, answer in part.items()}
            directory.write_json("predictions.json", merged)

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        answers, loss = self._answers(model)
        sums = torch.tensor([loss, len(self.held), 0, 0, len(answers)], dtype=torch.float64)
        by_id = {str(question["id"]): question["answers"]["text"] for question in self.questions}
        for name, answer in answers.items():
            sums[2] += squad.exact_match(answer, by_id[name])
            sums[3] += squad.f1(answer, by_id[name])
        reduced = self.accelerator.reduce(sums.to(self.accelerator.device), "sum").tolist()
        loss, readings, exact, overlap, count = reduced
        shares = {"exact": exact / count, "f1": overlap / count}
        return {"loss": loss / readings, **shares, "count": int(count)}

    def _answers(self, model: nn.Module) -> tuple[dict[str, str], float]:
        """Return this process's answers by question id, and the sum of its readings' losses."""
        total, best = 0.0, dict[int, squad.Found]()
        with evaluating(model):
            for batch in batches_of(self.loaders[1], 0):
                batch = batch.to(self.accelerator.device)
                with self.accelerator.autocast():
                    start, end = model(batch.tokens, batch.types, batch.seen)
                total += float(_loss(start, end, batch).double().sum())
                spans = squad.best_spans(start, end, batch, self.config.questions.longest_answer)
                for reading, found in zip(batch.readings, spans, strict=True):
                    known = best.get(reading.question)
                    if known is None or found.score > known.score:
                        best[reading.question] = found
        answers = {}
        for number, found in best.items():
            question = self.questions[number]
            none = self.some_unanswered and found.score < 0
            text = "" if none else question["context"][found.start : found.end]
            answers[str(question["id"])] = text
        return answers, total


def _code(config: LmConfig) -> squad.Marked:
    """Return the tokeniser: that of a released model, or a new one."""
    if config.model.pretrained is not None:
        return squad.read_released(Path(config.model.pretrained))
    if config.data.tokens == "bytes":
        return squad.Marked()
    return squad.Marked(make_tokens(config.data, open_corpus(config.data, "train")).tokenizer)


def _loss(start: torch.Tensor, end: torch.Tensor, batch: squad.ReadingBatch) -> torch.Tensor:
    parts = ((start, batch.start), (end, batch.end))
    losses = [F.cross_entropy(x.float(), y, reduction="none") for x, y in parts]
    return (losses[0] + losses[1]) / 2
