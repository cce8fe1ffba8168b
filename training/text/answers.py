"""Questions as model inputs, and SQuAD's metrics of answers.

As in BERT, the input is the question and a part of the context with three special tokens; a long
context is read in overlapping parts (Devlin et al., 2019; Rajpurkar et al., 2016).
"""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from training.data.loaders import Movable
from training.errors import UserError
from training.text.options import QuestionConfig
from training.text.questions import Question
from training.text.tokens import ByteTokens, tokenizers_package, uncut


class Marked:
    """A tokeniser that returns positions of tokens, with three special tokens.

    Args:
        tokenizer: an object of the ``tokenizers`` package; None: bytes. If it lacks the special
            tokens, they are added after its vocabulary.
    """

    def __init__(self, tokenizer: Any = None) -> None:
        self.tokenizer, size, found = tokenizer, 256, [None]
        if tokenizer is not None:
            found = [tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]", "[PAD]")]
            size = max(tokenizer.get_vocab().values()) + 1
        marks = [size, size + 1, size + 2] if None in found else found
        self.begin, self.between, self.padding = marks
        self.vocab_size = max(size, max(marks) + 1)

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens [n], and start and end of each in characters [n, 2]."""
        if self.tokenizer is None:
            ids = ByteTokens().encode(text).astype(np.int64)
            # Continuation bytes of UTF-8 are 10xxxxxx.
            number = np.cumsum((ids & 0xC0) != 0x80) - 1
            return ids, np.stack([number, number + 1], 1)
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        ids = np.array(encoded.ids, dtype=np.int64)
        return ids, np.array(encoded.offsets, dtype=np.int64).reshape(-1, 2)


def read_released(folder: Path) -> Marked:
    """Read the vocabulary of a released BERT: tokenizer.json, or vocab.txt (uncased)."""
    tokenizers = tokenizers_package("model.pretrained")
    whole, words = folder / "tokenizer.json", folder / "vocab.txt"
    try:
        if whole.is_file():
            return Marked(uncut(tokenizers.Tokenizer.from_file(str(whole))))
        if words.is_file():
            return Marked(uncut(tokenizers.BertWordPieceTokenizer(str(words))))
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(
            f"model.pretrained: cannot read the vocabulary in {str(folder)!r}: {error}"
        ) from error
    raise UserError(f"model.pretrained: {str(folder)!r} has no tokenizer.json and no vocab.txt")


@dataclass(frozen=True)
class Reading:
    """A question and a part of its context.

    Attributes:
        tokens: int32 [n].
        types: uint8 [n], 1 in the context and the last special token.
        spans: int32 [n, 2], start and end of each token in the context, in characters; -1 for
            other tokens.
        start: index of the first token of the answer; 0 if this part has no answer.
        end: index of its last token, or 0.
    """

    question: int
    tokens: np.ndarray
    types: np.ndarray
    spans: np.ndarray
    start: int
    end: int


def make_readings(
    questions: Iterable[Question], code: Marked, config: QuestionConfig
) -> list[Reading]:
    """Split contexts into parts that fit; the target is the first answer of each question.

    Raises:
        UserError: if the length is too small, or the stride skips tokens.
    """
    room = config.length - config.longest_question - 3
    if not 1 <= config.stride <= room:
        raise UserError(
            f"questions.stride: {config.stride} is not from 1 to {room}, which is "
            f"questions.length: {config.length} minus questions.longest_question: "
            f"{config.longest_question} and three special tokens"
        )
    readings = []
    encode = functools.lru_cache(maxsize=1)(code.encode)  # many questions have one context
    for number, question in enumerate(questions):
        asked, _ = code.encode(question["question"].strip())
        context, spans = encode(question["context"])
        first, last = _answer(question, spans)
        asked = asked[: config.longest_question]
        fits = config.length - len(asked) - 3
        for begin in range(0, max(len(context) - fits, 0) + config.stride, config.stride):
            part = slice(begin, begin + fits)
            before = len(asked) + 2
            here = first is not None and begin <= first and last < begin + fits
            tokens = [[code.begin], asked, [code.between], context[part], [code.between]]
            outside = np.full((before, 2), -1)
            readings.append(
                Reading(
                    number,
                    np.concatenate(tokens).astype(np.int32),
                    np.array([0] * before + [1] * (len(context[part]) + 1), dtype=np.uint8),
                    np.concatenate([outside, spans[part], [[-1, -1]]]).astype(np.int32),
                    first - begin + before if here else 0,
                    last - begin + before if here else 0,
                )
            )
            if begin + fits >= len(context):
                break
    return readings


def _answer(question: Question, spans: np.ndarray) -> tuple[int | None, int | None]:
    """Return the first and the last token of a question's first answer."""
    answers = question["answers"]
    if not answers["text"]:
        return None, None
    start = answers["answer_start"][0]
    end = start + len(answers["text"][0])
    touched = np.flatnonzero((spans[:, 0] < end) & (spans[:, 1] > start))
    return (int(touched[0]), int(touched[-1])) if len(touched) else (None, None)


@dataclass
class ReadingBatch(Movable):
    """B padded readings; tensors are [B, L], ``start`` and ``end`` [B]."""

    readings: tuple[Reading, ...]
    tokens: Tensor
    types: Tensor
    seen: Tensor
    start: Tensor
    end: Tensor


def pad(readings: Sequence[Reading], padding: int) -> ReadingBatch:
    """Return a batch of readings, padded to the longest."""

    def rows(arrays: Iterable[np.ndarray], value: int) -> Tensor:
        parts = [torch.from_numpy(array.astype(np.int64)) for array in arrays]
        return pad_sequence(parts, batch_first=True, padding_value=value)

    tokens, types = (
        rows((r.tokens for r in readings), padding),
        rows((r.types for r in readings), 0),
    )
    seen = rows((np.ones_like(r.tokens) for r in readings), 0).bool()
    ends = ([reading.start for reading in readings], [reading.end for reading in readings])
    return ReadingBatch(tuple(readings), tokens, types, seen, *map(torch.tensor, ends))


@dataclass(frozen=True)
class Found:
    """An answer: score relative to no answer, and start and end in characters of the context."""

    score: float
    start: int
    end: int


def best_spans(start: Tensor, end: Tensor, batch: ReadingBatch, longest: int) -> list[Found]:
    """Return the best span of each reading, of at most ``longest`` tokens of the context.

    The score of a span is the sum of the logits of its ends, minus that of the first special token,
    which means no answer.

    Args:
        start: logits of the first token ``[B, L]``.
        end: logits of the last token ``[B, L]``.
        longest: maximum number of tokens.
    """
    places = [torch.from_numpy(reading.spans[:, 0] >= 0) for reading in batch.readings]
    inside = pad_sequence(places, batch_first=True)
    none = (start[:, 0] + end[:, 0]).double()
    start, end = (x.double().masked_fill(~inside.to(x.device), -torch.inf) for x in (start, end))
    size = min(longest, start.shape[1])
    # [B, lengths, L]: the span of k + 1 tokens that starts at each token.
    later = torch.nn.functional.pad(end, (0, size - 1), value=-torch.inf)
    scores = start.unsqueeze(1) + torch.stack(
        [later[:, more : more + start.shape[1]] for more in range(size)], 1
    )
    best, place = scores.flatten(1).max(1)
    found = []
    above = (best - none).tolist()
    for reading, score, at in zip(batch.readings, above, place.tolist(), strict=True):
        more, first = divmod(at, start.shape[1])
        begin, end_of = reading.spans[first, 0], reading.spans[first + more, 1]
        found.append(Found(score, int(begin), int(end_of)))
    return found


# --- SQuAD's metrics ------------------------------------------------------------------------------

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Return a text in lower case, without punctuation, articles and extra white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, truths: Sequence[str]) -> float:
    """Return 1 if the normalised answer is one of the truths (empty, if there are none), else 0."""
    return float(any(normalised(answer) == normalised(truth) for truth in truths or [""]))


def f1(answer: str, truths: Sequence[str]) -> float:
    """Return the highest F1 of words over the truths (empty, if there are none)."""
    return max(
        _f1(normalised(answer).split(), normalised(truth).split()) for truth in truths or [""]
    )


def _f1(answer: list[str], truth: list[str]) -> float:
    if not answer or not truth:
        return float(answer == truth)
    common = sum((Counter(answer) & Counter(truth)).values())
    return 2 * common / (len(answer) + len(truth))
