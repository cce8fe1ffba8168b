"""Questions whose answer is a span of their context: SQuAD, or generated from source code.

Each question is a dict as in Hugging Face's ``squad``: id, title, context, question and
``answers``, with the lists text and answer_start (in characters; both empty without an answer).
"""

from __future__ import annotations

import ast
import itertools
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.seeding import derive
from training.text.corpus import PREFIX, Document, load_rows, open_corpus
from training.text.options import QuestionConfig, TextConfig

Question = dict[str, Any]

_COLUMNS = ("id", "title", "context", "question", "answers")
_LONGEST_ANSWER = 80  # characters
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def open_questions(config: QuestionConfig, split: str) -> Iterable[Question]:
    """Return the questions of "train" or "validation", in a fixed order.

    Raises:
        UserError: if the name is unknown, a file or split is missing, or a file is not SQuAD's.
    """
    training = split == "train"
    if config.name.startswith(PREFIX):
        own_name = config.train_split if training else config.val_split
        return load_rows(config.name.removeprefix(PREFIX), own_name, _COLUMNS, config.kwargs)
    if config.name == "stdlib":
        known = () if training else open_corpus(TextConfig(), "train")
        return make_questions(open_corpus(TextConfig(), split), config.context, known)
    if config.name != "files":
        raise UserError(
            f"data.name: unknown questions {config.name!r}; valid: stdlib, files, {PREFIX}NAME"
        )
    path, key = (config.root, "root") if training else (config.val_root, "val_root")
    if path is None:
        raise UserError(f"data.{key} is not set, and data.name: files needs it")
    return read_squad(Path(path))


def read_squad(path: Path) -> list[Question]:
    """Read SQuAD's JSON, of version 1.1 or 2.0.

    Raises:
        UserError: if the file is not SQuAD's, or an answer is not at its position.
    """
    try:
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
        questions = [
            {
                "id": str(entry["id"]),
                "title": article.get("title", ""),
                "context": paragraph["context"],
                "question": entry["question"],
                "answers": {
                    "text": [answer["text"] for answer in entry["answers"]],
                    "answer_start": [int(answer["answer_start"]) for answer in entry["answers"]],
                },
            }
            for article in articles
            for paragraph in article["paragraphs"]
            for entry in paragraph["qas"]
        ]
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{str(path)!r} is not a SQuAD JSON file: {reason}") from error
    if not questions:
        raise UserError(f"{str(path)!r} has no questions")
    for question in questions:
        check_answers(question)
    return questions


def check_answers(question: Question) -> None:
    """Raise :class:`UserError` unless each answer is at its position in the context."""
    answers = question["answers"]
    for text, start in zip(answers["text"], answers["answer_start"], strict=True):
        found = question["context"][start : start + len(text)]
        if start < 0 or not text or found != text:
            raise UserError(
                f"question {question['id']!r}: the answer {text!r:.60} is not at character "
                f"{start} of its context, which has {found!r:.60} there"
            )


def make_questions(
    documents: Iterable[Document], context: int = 512, known: Iterable[Document] = ()
) -> list[Question]:
    """Return questions about the functions in Python source code.

    There are three kinds of answers: the first line of a docstring, the expression of the only
    return statement, and the default of a parameter. The position of the function in the context is
    random, from the question's id. Functions whose name is defined twice in the context are left
    out, and so are repeated functions and files that are not Python.

    Args:
        context: maximum length of a context, in characters; it has whole lines.
        known: documents of training, whose functions are left out too.
    """
    seen = {key for document in known for key, _ in _ask(document, context)}
    questions = []
    for document in documents:
        for key, question in _ask(document, context):
            if key not in seen:
                seen.add(key)
                questions.append(question)
    return questions


def _ask(document: Document, size: int) -> Iterator[tuple[tuple[str, str], Question]]:
    """Yield (key, question); the key is the question and the function's text up to the answer."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about the documents
            tree = ast.parse(document.text)
    except (SyntaxError, ValueError):
        return
    lines = _Lines(document.text)
    for node in ast.walk(tree):
        if not isinstance(node, _FUNCTIONS):
            continue
        head = lines.place(node.lineno, 0)
        for kind, question, start, end in _spans(node, lines):
            answer = document.text[start:end]
            if not answer or "\n" in answer or len(answer) > _LONGEST_ANSWER:
                continue
            name = f"{document.name}:{node.lineno}:{kind}"
            begin, stop = _around(document.text, head, end, size, name)
            chosen = document.text[begin:stop]
            heads = re.findall(rf"\bdef\s+{node.name}\b", chosen)
            if not begin <= head <= start < end <= stop or len(heads) != 1:
                continue
            answers = {"text": [answer], "answer_start": [start - begin]}
            parts = (name, document.name, chosen, question, answers)
            yield (question, document.text[head:end]), dict(zip(_COLUMNS, parts, strict=True))


def _spans(
    node: ast.FunctionDef | ast.AsyncFunctionDef, lines: _Lines
) -> Iterator[tuple[str, str, int, int]]:
    """Yield kind, question, and start and end of the answer in the text."""
    first = node.body[0]
    if ast.get_docstring(node) and isinstance(first, ast.Expr):
        start, end = lines.span(first)
        said = ast.get_docstring(node).splitlines()[0].strip()
        at = lines.text.find(said, start, end)
        if at >= 0:
            yield "does", f"What does {node.name} do?", at, at + len(said)
    returns = [inner for inner in _own(node) if isinstance(inner, ast.Return) and inner.value]
    if len(returns) == 1:
        yield "returns", f"What does {node.name} return?", *lines.span(returns[0].value)
    plain = [*node.args.posonlyargs, *node.args.args]
    defaults = node.args.defaults
    pairs = [
        *zip(plain[len(plain) - len(defaults) :], defaults, strict=True),
        *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True),
    ]
    for parameter, default in pairs:
        if default is not None:
            asked = f"What is the default of {parameter.arg} in {node.name}?"
            yield f"default {parameter.arg}", asked, *lines.span(default)


def _own(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a function, without those of inner functions and classes."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, (*_FUNCTIONS, ast.ClassDef, ast.Lambda)):
            yield from _own(child)


def _around(text: str, head: int, end: int, size: int, name: str) -> tuple[int, int]:
    """Return start and end of whole lines of up to ``size`` characters around ``head``, ``end``."""
    room = max(size - (end - head), 0)
    begin = max(head - derive("context", name) % (room + 1), 0)
    stop = min(begin + size, len(text))
    if begin:
        begin = text.find("\n", begin - 1) + 1
    if stop < len(text):
        stop = text.rfind("\n", 0, stop) + 1
    return begin, stop


class _Lines:
    """Converts ``ast``'s lines and UTF-8 byte offsets to positions in characters."""

    def __init__(self, text: str) -> None:
        self.text = text
        # splitlines would also split at form feeds, which are white space in Python source.
        self.lines = text.split("\n")
        self.starts = [0, *itertools.accumulate(len(line) + 1 for line in self.lines)]

    def place(self, line: int, byte: int) -> int:
        before = self.lines[line - 1].encode("utf-8")[:byte]
        return self.starts[line - 1] + len(before.decode("utf-8"))

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        start = self.place(node.lineno, node.col_offset)
        return start, self.place(node.end_lineno or 0, node.end_col_offset or 0)
