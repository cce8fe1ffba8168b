"""Excerpts with their package, and questions whose answer is a span."""

import json
import sys
import types
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from common import refuses

from training.data.loaders import batches_of, make_loader
from training.errors import UserError
from training.lm.excerpts import make_excerpts
from training.text.corpus import SPLITS, Document, open_corpus
from training.text.options import QuestionConfig, TextConfig
from training.text.questions import check_answers, make_questions, open_questions, read_squad


def library(packages=("ant", "bee", "cat"), count=10, size=100) -> dict[str, list[Document]]:
    """Documents whose text says which file they are, 8 of 10 for training."""
    splits = {"train": [], "validation": []}
    for package in packages:
        for number in range(count):
            text = "".join(f"{package}/{number}:{word} " for word in range(size))[:size]
            split = "train" if number < count * 0.8 else "validation"
            splits[split].append(Document(f"{package}/{number}.py", text))
    return splits


# --- excerpts ------------------------------------------------------------------------------------


def test_excerpts_are_cut_from_their_files():
    splits = library()
    splits["train"].append(Document("alone.py", "x" * 100))  # a package of one file
    texts = {document.name: document.text for part in splits.values() for document in part}
    found = make_excerpts(splits, 30)
    assert found["train"].classes == found["validation"].classes == ("ant", "bee", "cat")
    for split, per_class in (("train", 24), ("validation", 6)):
        excerpts = found[split]
        assert len(excerpts) == 3 * per_class
        assert np.bincount(excerpts.labels).tolist() == [per_class] * 3
        for content, label, name in zip(
            excerpts.bytes, excerpts.labels, excerpts.names, strict=True
        ):
            file, start = name.rsplit(":", 1)
            assert bytes(content).decode() == texts[file][int(start) : int(start) + 30]
            assert file.split("/")[0] == excerpts.classes[label]


def test_no_excerpt_is_in_two_splits():
    splits = library()
    shared = "the same licence text in each file......"
    splits = {
        split: [Document(document.name, shared + document.text) for document in documents]
        for split, documents in splits.items()
    }
    found = make_excerpts(splits, 20)
    train, held_out = ({bytes(row) for row in found[split].bytes} for split in found)
    assert not train & held_out
    assert {name.rsplit(":")[0] for name in found["train"].names}.isdisjoint(
        name.rsplit(":")[0] for name in found["validation"].names
    )
    assert len(found["validation"]) == 3 * 2 * 5


def test_packages_need_enough_files_and_excerpts_everywhere():
    splits = library(("ant", "bee", "cat"))
    splits["train"] += library(("dog",), count=20)["train"]  # nothing held out
    splits["train"] += library(("eel",), count=5)["train"]
    splits["validation"] += library(("eel",), count=5)["validation"]
    assert make_excerpts(splits, 30)["train"].classes == ("ant", "bee", "cat")
    assert make_excerpts(splits, 30, min_files=5)["train"].classes == ("ant", "bee", "cat", "eel")
    with pytest.raises(UserError, match="excerpt of 101 bytes"):
        make_excerpts(splits, 101)
    with pytest.raises(UserError, match="0 of 5 packages have 99 files"):
        make_excerpts(splits, 30, min_files=99)


def test_a_cap_keeps_the_same_excerpts_whatever_else_is_there():
    whole = make_excerpts(library(), 30)["train"]
    capped = make_excerpts(library(), 30, per_class=5)["train"]
    assert np.bincount(capped.labels).tolist() == [5, 5, 5]
    assert set(capped.names) < set(whole.names)
    assert capped.names == make_excerpts(library(), 30, per_class=5)["train"].names
    assert {name.split("/")[1][0] for name in capped.names} != {"0"}  # not simply the first


def test_batches_of_excerpts():
    excerpts = make_excerpts(library(), 30)["train"]

    def rows(**options):
        epoch = options.pop("epoch", 0)
        loader = make_loader(excerpts, batch_size=7, **{"seed": 0, **options})
        batches = list(batches_of(loader, epoch))
        pairs = [pair for b in batches for pair in zip(b.images, b.targets, strict=True)]
        return [(bytes(content.tolist()), int(label)) for content, label in pairs]

    everything = Counter(zip(map(bytes, excerpts.bytes), excerpts.labels.tolist(), strict=True))
    assert Counter(rows(training=False)) == everything
    parts = [rows(training=False, rank=shard, world=5) for shard in range(5)]
    assert sum(map(Counter, parts), Counter()) == everything
    trained = rows(training=True, seed=1)
    assert len(trained) == 70
    assert trained == rows(training=True, seed=1)
    assert trained != rows(training=True, seed=1, epoch=1)
    assert trained != rows(training=True, seed=2)
    halves = [rows(training=True, seed=1, rank=shard, world=2) for shard in range(2)]
    assert not set(halves[0]) & set(halves[1])
    batch = next(iter(make_loader(excerpts, batch_size=7, training=True, seed=0)))
    assert (batch.images.shape, str(batch.images.dtype)) == ((7, 30), "torch.int64")
    assert batch.targets.shape == (7,)


@pytest.mark.parametrize("size", [512, 2048])
def test_excerpts_of_this_python(size):
    splits = {split: open_corpus(TextConfig(), split) for split in SPLITS}
    found = make_excerpts(splits, size)
    assert len(found["train"].classes) >= 2
    for excerpts in found.values():
        assert excerpts.bytes.shape == (len(excerpts), size)
        assert set(excerpts.labels) == set(range(len(excerpts.classes)))


# --- questions made from source code -------------------------------------------------------------

SOURCE = '''\
"""A module; naïve."""

def area(width, height=2.5, *, unit="m²"):
    """Return the area of a rectangle.

    More about it.
    """
    def inner():
        return 0
    return width * height  # é

class Shape:
    async def draw(self, colour=('red', "é"), /, size=None):
        "Draw the shape on the screen — é."
        if size: return 1
        return 2

    def bare(self): return self.ärea if True else """a
b"""
'''


def asked(questions) -> dict[str, str]:
    return {question["question"]: question["answers"]["text"][0] for question in questions}


def test_questions_about_functions():
    questions = make_questions([Document("shapes.py", SOURCE)], 1000)
    assert asked(questions) == {
        "What does area do?": "Return the area of a rectangle.",
        "What does area return?": "width * height",
        "What is the default of height in area?": "2.5",
        "What is the default of unit in area?": '"m²"',
        "What does inner return?": "0",
        "What does draw do?": "Draw the shape on the screen — é.",
        "What is the default of colour in draw?": "('red', \"é\")",
        "What is the default of size in draw?": "None",
    }
    for question in questions:
        check_answers(question)
        assert list(question) == ["id", "title", "context", "question", "answers"]
    assert len({question["id"] for question in questions}) == len(questions)


def test_contexts_are_bounded_whole_lines_around_the_function():
    text = "".join(
        f"def function_{number}(x, y={number}):\n    '''Do thing {number}.'''\n    return x\n\n"
        for number in range(60)
    )
    questions = make_questions([Document("many.py", text)], 200)
    assert len(questions) > 150
    starts = Counter()
    for question in questions:
        check_answers(question)
        context = question["context"]
        assert 0 < len(context) <= 200
        assert context in text
        assert context.endswith("\n")
        at = text.index(context)
        assert at == 0 or text[at - 1] == "\n"
        name = question["question"].rstrip("?").split()
        function = next(word for word in name if word.startswith("function_"))
        assert context.count(f"def {function}(") == 1
        starts[question["answers"]["answer_start"][0]] += 1
    assert len(starts) > 20  # not always at one place
    assert make_questions([Document("many.py", text)], 200) == questions
    # A context too short for the head and the answer is no context.
    assert make_questions([Document("many.py", text)], 10) == []


def test_ambiguous_repeated_and_foreign_text_is_left_out():
    twice = "def f(a=1):\n    return 2\n\ndef f(a=1):\n    return 3\n"
    assert make_questions([Document("twice.py", twice)], 500) == []
    assert make_questions([Document("notes.txt", "this is (no Python")], 500) == []
    first, second = Document("a.py", SOURCE), Document("b.py", "x = 1\n" + SOURCE)
    other = Document("c.py", "def g(b=1):\n    return 7\n")
    assert len(make_questions([first, second], 1000)) == 8
    assert asked(make_questions([second, other], 1000, known=[first])) == {
        "What does g return?": "7",
        "What is the default of b in g?": "1",
    }


def test_questions_of_this_python():
    documents = list(open_corpus(TextConfig(), "test"))[:12]
    questions = make_questions(documents)
    assert questions
    for question in questions:
        check_answers(question)
        assert len(question["context"]) <= 512


# --- SQuAD ---------------------------------------------------------------------------------------


def squad(path: Path, **changes) -> Path:
    answer = {"text": "Rome", "answer_start": 3}
    entries = [
        {"id": "1", "question": "Where?", "answers": [answer]},
        {"id": 2, "question": "Why?", "answers": [], "is_impossible": True},
    ]
    entries[0].update(changes)
    paragraph = {"context": "In Rome.", "qas": entries}
    path.write_text(json.dumps({"data": [{"title": "Rome", "paragraphs": [paragraph]}]}))
    return path


def test_squad_file(tmp_path):
    squad(tmp_path / "dev.json")
    config = QuestionConfig(name="files", val_root=str(tmp_path / "dev.json"))
    expected = {"title": "Rome", "context": "In Rome."}
    answers = {"text": ["Rome"], "answer_start": [3]}
    assert open_questions(config, "validation") == [
        {"id": "1", **expected, "question": "Where?", "answers": answers},
        {"id": "2", **expected, "question": "Why?", "answers": {"text": [], "answer_start": []}},
    ]
    with pytest.raises(UserError, match="data.root is not set"):
        open_questions(config, "train")


def test_bad_squad_files(tmp_path):
    path = tmp_path / "bad.json"
    wrong = [{"text": "Rome", "answer_start": 4}]
    cases = [
        (lambda: squad(path, answers=wrong), ["question '1'", "'Rome'", "character 4", "'ome.'"]),
        (lambda: squad(path, answers=[{"text": "Rome"}]), ["bad.json", "answer_start"]),
        (lambda: path.write_text("{"), ["bad.json", "not a SQuAD"]),
        (lambda: path.write_text("[]"), ["not a SQuAD"]),
        (lambda: path.write_text('{"data": []}'), ["no questions"]),
        (lambda: path.write_bytes(b"\xff\0"), ["not a SQuAD"]),
        (lambda: path.unlink(), ["cannot read", "bad.json"]),
    ]
    for prepare, parts in cases:
        prepare()
        refuses(partial(read_squad, path), *parts, error=UserError)


def test_squad_from_the_hub(monkeypatch):
    class Rows(list):
        column_names = ("id", "title", "context", "question", "answers")

    rows = Rows([{"id": "1"}])
    module = types.ModuleType("datasets")
    module.load_dataset = lambda path, split: rows if (path, split) == ("squad", "dev") else None
    monkeypatch.setitem(sys.modules, "datasets", module)
    config = QuestionConfig(name="hfds/squad", val_split="dev")
    assert open_questions(config, "validation") is rows
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="hfds/squad needs the datasets package"):
        open_questions(config, "validation")
    cases = [
        (QuestionConfig(name="squad"), "train", "valid: stdlib"),
    ]
    for config, split, part in cases:
        with pytest.raises(UserError, match=part):
            open_questions(config, split)
