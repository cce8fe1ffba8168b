"""train_lm.py's other tasks: which package is this from, and where in the text is the answer."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from cls_command import ROOT
from lm_command import TINY_TASK
from processes import launch
from released import released_names
from run_files import assert_one_line, newest_state, records, same

import train_lm
from models.text import Bert, SpanFinder
from training.errors import UserError
from training.text.answers import (
    Found,
    Marked,
    Reading,
    best_spans,
    exact_match,
    f1,
    make_readings,
    pad,
)
from training.text.options import QuestionConfig


@pytest.fixture
def lm(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Return ``run(*arguments) -> (status, output, errors)`` of train_lm.py, in this process."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = train_lm.main([*TINY_TASK, f"--run.output={tmp_path / 'runs'}", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


# --- excerpts -------------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path: Path) -> list[str]:
    """Three packages of 30 files, which use letters of their own."""
    draw = random.Random(0)
    for package, letters in (("ant", "abcde "), ("bee", "fghij "), ("cat", "klmno ")):
        folder = tmp_path / "library" / package
        folder.mkdir(parents=True)
        for number in range(30):
            (folder / f"{number}.py").write_text("".join(draw.choices(letters, k=70)))
    options = ["--task=excerpts", "--excerpts.size=32", f"--data.root={tmp_path / 'library'}"]
    return [*options, "--batch_size=32", "--epochs=6"]


def test_packages_are_told_apart(lm, library, tmp_path: Path):
    status, out, err = lm(*library, "--encoding=huang4,clip=8", "--run.progress=lines")
    assert status == 0, err
    folder = tmp_path / "runs" / "excerpts32-huang4,clip=8-seed0"
    assert "texts/s" in err and "held-out accuracy 100.00 %" in out
    last = records(folder)[-1]
    assert last["top1"] == 1.0 and last["count"] > 5
    file = folder / "checkpoints" / "last.safetensors"
    for split in ("validation", "test"):
        more = ["--eval-only", f"--checkpoint={file}", f"--split={split}"]
        status, out, err = lm(*library, "--encoding=huang4,clip=8", *more)
        assert status == 0, err
        assert "held-out accuracy 100.00 %" in out


def test_excerpts_resume_and_processes(lm, library, tmp_path: Path, stopped):
    assert lm(*library, "--run.experiment=whole")[0] == 0
    with stopped(9):
        assert lm(*library, "--run.experiment=parts", "--run.save_steps=1")[0] == 130
    state = newest_state(tmp_path / "runs" / "parts")
    assert state["step"] == 9 and state["within"] > 0
    assert lm(*library, "--run.experiment=parts", "--resume=auto")[0] == 0
    runs = tmp_path / "runs"
    assert records(runs / "whole") == records(runs / "parts")
    assert same(runs / "whole", runs / "parts")
    for path in (tmp_path / "library" / "ant").iterdir():
        path.write_text(path.read_text().replace("a", "b"))
    more = [*library, f"--resume={runs / 'parts'}", "--epochs=99"]
    status, _, err = lm(*more)
    assert status == 2 and "changed" in err and "--allow-changed-data" in err


# --- readings -------------------------------------------------------------------------------------


def question(context: str, answer: str | None, asked: str = "What?", name: str = "q") -> dict:
    start = [] if answer is None else [context.index(answer)]
    answers = {"text": [answer] if start else [], "answer_start": start}
    return {"id": name, "title": "", "context": context, "question": asked, "answers": answers}


def test_readings_by_bytes():
    config = QuestionConfig(length=26, stride=6, longest_question=8, longest_answer=9)
    context = "für héro: naïve café, ok?"  # 29 bytes
    found = question(context, "héro")
    readings = make_readings([found], Marked(), config)
    raw = context.encode()
    covered, answered = set(), 0
    for reading in readings:
        assert len(reading.tokens) == len(reading.types) == len(reading.spans) <= 26
        assert reading.tokens[0] == 256 and (reading.tokens == 257).sum() == 2
        assert bytes(reading.tokens[1:6].astype(np.uint8)) == b"What?"
        inside = np.flatnonzero(reading.spans[:, 0] >= 0)
        assert reading.types[inside].all() and not reading.types[: inside[0]].any()
        part = bytes(reading.tokens[inside].astype(np.uint8))
        at = raw.index(part)
        covered |= set(range(at, at + len(part)))
        # A token's characters, also where a character has two bytes.
        for token, (begin, end) in zip(reading.tokens[inside], reading.spans[inside], strict=True):
            assert end == begin + 1 and int(token) in context[begin].encode()
        if reading.end:
            answered += 1
            spans = reading.spans[reading.start : reading.end + 1]
            assert context[spans[0, 0] : spans[-1, 1]] == "héro"
        else:
            assert reading.start == 0
    assert covered == set(range(len(raw)))
    assert len(readings) == 3 and answered == 1


def test_a_context_that_fits_is_read_once():
    config = QuestionConfig(length=40, stride=8, longest_question=8)
    found = [question("a short one", "short"), question("another", None), question("", None)]
    readings = make_readings(found, Marked(), config)
    assert [reading.question for reading in readings] == [0, 1, 2]
    assert [(reading.start, reading.end) for reading in readings[1:]] == [(0, 0)] * 2


def test_best_spans_against_loops():
    torch.manual_seed(0)
    config = QuestionConfig(length=30, stride=9, longest_question=6)
    asked = [question("one two three four five six", "three"), question("seven eight", "eight")]
    readings = make_readings(asked, Marked(), config)
    batch = pad(readings, 258)
    start, end = torch.randn(2, *batch.tokens.shape)
    for longest in (1, 4, 80):
        for row, found in enumerate(best_spans(start, end, batch, longest)):
            reading, best = readings[row], None
            for i in range(len(reading.tokens)):
                for j in range(i, min(i + longest, len(reading.tokens))):
                    if reading.spans[i, 0] < 0 or reading.spans[j, 0] < 0:
                        continue
                    score = float(start[row, i] + end[row, j] - start[row, 0] - end[row, 0])
                    if best is None or score > best.score:
                        best = Found(score, reading.spans[i, 0], reading.spans[j, 1])
            assert found.score == pytest.approx(best.score, abs=1e-5)
            assert (found.start, found.end) == (best.start, best.end)


def test_padding():
    readings = [
        Reading(0, np.arange(n), np.ones(n, dtype=np.uint8), np.zeros((n, 2), int), 1, n - 1)
        for n in (3, 5)
    ]
    batch = pad(readings, 99)
    assert batch.tokens.tolist() == [[0, 1, 2, 99, 99], [0, 1, 2, 3, 4]]
    assert batch.seen.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert (batch.start.tolist(), batch.end.tolist()) == ([1, 1], [2, 4])


@pytest.mark.parametrize(
    ("answer", "truths", "exact", "overlap"),
    [
        ("The cat.", ["cat"], 1, 1),
        ("a red cat", ["red", "the red fox"], 0, 2 / 3),
        ("dog", ["cat"], 0, 0),
        ("", [], 1, 1),
        ("x", [], 0, 0),
        ("cat cat dog", ["cat dog dog"], 0, 2 / 3),
    ],
)
def test_scores_of_squad(answer, truths, exact, overlap):
    """By hand: overlap of words after case, punctuation and articles."""
    assert exact_match(answer, truths) == exact
    assert f1(answer, truths) == pytest.approx(overlap)


def test_readings_that_cannot_be():
    for options in ({"length": 20, "longest_question": 18}, {"stride": 0}, {"stride": 600}):
        with pytest.raises(UserError, match="questions.stride"):
            make_readings([], Marked(), QuestionConfig(**options))


# --- questions ------------------------------------------------------------------------------------


def squad(path: Path, count: int, seed: int, *, answered: float = 1.0) -> Path:
    """A file of SQuAD's form: which digits stand behind the letter that is asked for?"""
    draw, entries = random.Random(seed), []
    for number in range(count):
        letters = draw.sample("abcdefgh", 4)
        digits = [str(draw.randrange(100, 1000)) for _ in letters]
        context = " ".join(f"{x}{d}" for x, d in zip(letters, digits, strict=True))
        which = draw.randrange(4)
        found = question(context, digits[which], f"{letters[which]}?", f"{seed}-{number}")
        if draw.random() > answered:
            found["answers"] = {"text": [], "answer_start": []}
        pairs = zip(found["answers"]["text"], found["answers"]["answer_start"], strict=True)
        entry = {"id": found["id"], "question": found["question"]}
        entry["answers"] = [{"text": text, "answer_start": at} for text, at in pairs]
        entries.append({"context": context, "qas": [entry]})
    path.write_text(json.dumps({"data": [{"title": "digits", "paragraphs": entries}]}))
    return path


@pytest.fixture
def asked(tmp_path: Path) -> list[str]:
    files = [squad(tmp_path / "train.json", 96, 0), squad(tmp_path / "held.json", 21, 1)]
    options = ["--task=questions", "--questions.name=files", f"--questions.root={files[0]}"]
    options += [f"--questions.val_root={files[1]}", "--questions.length=32"]
    options += ["--questions.longest_question=4", "--questions.stride=12"]
    return [*options, "--questions.longest_answer=4", "--batch_size=16", "--epochs=2"]


def test_questions_run_and_resume(lm, asked, tmp_path: Path, stopped):
    status, out, err = lm(*asked, "--encoding=shaw,clip=8", "--run.experiment=whole")
    assert status == 0, err
    folder = tmp_path / "runs" / "whole"
    last = records(folder)[-1]
    assert last["count"] == 21
    assert f"exact match {100 * last['exact']:.2f}, F1 {100 * last['f1']:.2f}" in out
    # The written answers give the printed results.
    predictions = json.loads((folder / "predictions.json").read_text())
    truth = json.loads((tmp_path / "held.json").read_text())["data"][0]["paragraphs"]
    scores = []
    for paragraph in truth:
        entry = paragraph["qas"][0]
        assert predictions[entry["id"]] in paragraph["context"]
        scores.append(f1(predictions[entry["id"]], [a["text"] for a in entry["answers"]]))
    assert sum(scores) / 21 == pytest.approx(last["f1"])
    with stopped(8):
        saving = ["--run.experiment=parts", "--run.save_steps=1"]
        assert lm(*asked, "--encoding=shaw,clip=8", *saving)[0] == 130
    state = newest_state(tmp_path / "runs" / "parts")
    assert state["step"] == 8 and state["within"] > 0
    assert lm(*asked, "--encoding=shaw,clip=8", "--run.experiment=parts", "--resume=auto")[0] == 0
    assert same(folder, tmp_path / "runs" / "parts")
    file = folder / "checkpoints" / "last.safetensors"
    more = ["--eval-only", f"--checkpoint={file}", "--eval_batch_size=5"]
    status, out, err = lm(*asked, "--encoding=shaw,clip=8", *more)
    assert f"F1 {100 * last['f1']:.2f} (21 questions)" in out


def test_questions_are_learned(lm, asked, tmp_path: Path):
    """One text by heart: the path from characters to tokens and back is whole."""
    squad(tmp_path / "held.json", 96, 0)
    more = ["--epochs=60", "--encoding=rope", "--model.dim=32", "--run.eval_every=60"]
    status, out, err = lm(*asked, *more, "--optim.lr=0.01", "--optim.weight_decay=0")
    assert status == 0, err
    figures = records(tmp_path / "runs" / "questions-rope-seed0")[-1]
    assert figures["exact"] > 0.8, figures


def test_questions_without_an_answer(lm, asked, tmp_path: Path):
    squad(tmp_path / "train.json", 96, 0, answered=0.0)
    squad(tmp_path / "held.json", 21, 1, answered=0.5)
    assert lm(*asked, "--run.experiment=x")[0] == 0
    figures = records(tmp_path / "runs" / "x")[-1]
    predictions = json.loads((tmp_path / "runs" / "x" / "predictions.json").read_text())
    assert set(predictions.values()) == {""}  # it has seen no other
    truth = json.loads((tmp_path / "held.json").read_text())["data"][0]["paragraphs"]
    without = sum(not paragraph["qas"][0]["answers"] for paragraph in truth)
    assert 0 < without < 21 and figures["exact"] == pytest.approx(without / 21)


@pytest.mark.slow
def test_two_processes_answer_each_question_once(asked, tmp_path: Path):
    results = []
    for processes in (1, 2):
        arguments = [*TINY_TASK, *asked, "--run.device=cpu", "--epochs=1", "--optim.opt=sgd"]
        arguments += [f"--run.output={tmp_path}", f"--run.experiment=of{processes}"]
        launch(processes, ROOT / "train_lm.py", *arguments)
        answers = json.loads((tmp_path / f"of{processes}" / "predictions.json").read_text())
        results.append((records(tmp_path / f"of{processes}")[0], answers))
    (one, answers), (two, others) = results
    assert one["count"] == two["count"] == 21 and answers.keys() == others.keys()
    for key in ("train_loss", "loss", "f1"):
        assert two[key] == pytest.approx(one[key], rel=1e-4), key


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "?", *"abcdefgh", *"0123456789"]
WORDS += [f"##{digit}" for digit in range(10)]


def released(folder: Path, kind: str, spec: str) -> Path:
    """A folder as a BERT is released in."""
    folder.mkdir()
    config = {
        "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 1, "type_vocab_size": 2,
        "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 32,
        "position_embedding_type": kind, "hidden_act": "gelu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(3)
    model = SpanFinder(Bert(len(WORDS), 16, 1, 2, 16, encoding=spec))
    weights = {k: v for k, v in released_names(model, kind).items() if "qa_outputs" not in k}
    weights["cls.predictions.bias"] = torch.zeros(len(WORDS))
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def test_a_released_bert_is_trained_on(lm, asked, tmp_path: Path):
    pytest.importorskip("tokenizers")
    folder = released(tmp_path / "bert", "relative_key_query", "huang4,clip=31")
    options = [*asked, f"--model.pretrained={folder}", "--encoding=huang4,clip=31"]
    status, out, err = lm(*options, "--run.experiment=x")
    assert status == 0, err
    first, last = records(tmp_path / "runs" / "x")
    assert last["train_loss"] < first["train_loss"] and last["count"] == 21
    status, _, err = lm(*asked, f"--model.pretrained={folder}", "--encoding=rope")
    assert status == 2
    assert "encoding: 'rope' is not that of" in err and "huang4,clip=31" in err
    absolute = released(tmp_path / "absolute", "absolute", "learned,length=32")
    options = [*asked, f"--model.pretrained={absolute}", "--encoding=learned,length=32"]
    assert lm(*options, "--attach=huang4,clip=8", "--run.experiment=y")[0] == 0
    (folder / "pytorch_model.bin").unlink()
    status, _, err = lm(*asked, f"--model.pretrained={folder}", "--encoding=huang4,clip=31")
    assert status == 2 and "has none of model.safetensors" in err


BAD = [
    (["--task=answers"], ["task", "excerpts", "questions"]),
    (["--questions.name=squad"], ["'squad'", "stdlib, files, hfds/"]),
    (["--questions.root=/nowhere.json"], ["/nowhere.json"]),
    (["--questions.stride=99"], ["questions.stride: 99"]),
    (["--questions.longest_answer=0"], ["questions.longest_answer: 0 is not at least 1"]),
    (["--batch_size=500"], ["batch_size: 500", "96 training texts"]),
    (["--model.pretrained=/nowhere"], ["/nowhere"]),
    (["--encoding=ropee"], ["'ropee'"]),
    (["--eval_batch_size=0"], ["eval_batch_size: 0"]),
    (["--eval-only"], ["eval_only needs checkpoint"]),
    (["--task=excerpts", "--model.pretrained=/x"], ["model.pretrained", "task: excerpts"]),
    (["--task=excerpts", "--data.root=/nowhere"], ["/nowhere"]),
    (["--task=excerpts", "--eval-only"], ["eval_only needs checkpoint"]),
]


@pytest.mark.parametrize(("arguments", "wanted"), BAD, ids=[" ".join(bad[0]) for bad in BAD])
def test_bad_input_is_one_line(arguments: list[str], wanted: list[str], lm, asked):
    status, out, err = lm(*(asked if "--task=excerpts" not in arguments else ()), *arguments)
    assert_one_line(status, err, *wanted)
