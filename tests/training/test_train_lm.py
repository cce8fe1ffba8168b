"""train_lm.py from end to end: artefacts, stages, segments, memories, evaluation, bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cls_command import ROOT
from lm_command import STAGED, TINY
from processes import launch
from run_files import assert_one_line, files, newest_state, records, same, weights

import irpe
from models.text import CausalLM
from training.config import parse
from training.lm.language import Held, Language
from training.lm.options import LmConfig
from training.loop import Loop
from training.text.segments import IGNORE
from training.text.tokens import ByteTokens

SHORTFORMER = ["--encoding=pia", "--order=stripes", "--memory=1", STAGED]
SHORTFORMER += ["--protocols=[{memory: true}, {kind: token, memory: true}]"]


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_leaves_everything(lm, tmp_path: Path, book: Path):
    protocols = "[{kind: nonoverlapping}, {kind: sliding, stride: 4}, {kind: token, length: 24}]"
    options = ["--encoding=shaw,clip=4", f"--protocols={protocols}"]
    status, out, err = lm(*options, "--ema.enabled", "--ema.decay=0.5", "--run.progress=lines")
    assert status == 0, err
    folder = tmp_path / "runs" / "lm-shaw,clip=4-seed0"
    assert f"run directory: {folder}" in out
    assert "epoch 4/4, step 12" in err and "tokens/s" in err
    assert "tokens to train on" in err
    found = files(folder)
    assert found == {
        "config.yaml",
        "metrics.jsonl",
        "curves.png",
        "scores.json",
        "sample.txt",
        "checkpoints/best.safetensors",
        "checkpoints/last.safetensors",
        "checkpoints/last-ema.safetensors",
        "checkpoints/state-epoch3-step9.pt",
        "checkpoints/state-epoch4-step12.pt",
        "progress.json",
    }
    first, *_, last = records(folder)
    assert last["ema_bits_per_byte"] < first["ema_bits_per_byte"] < 8
    assert last["tokens"] == 300
    assert last["bits_per_byte"] == pytest.approx(last["loss"] / np.log(2))
    # Every protocol says which it is, in the file and on the screen.
    scores = json.loads((folder / "scores.json").read_text())
    labels = [
        "non-overlapping, window 16",
        "sliding window, stride 4, window 16",
        "token by token, window 24",
    ]
    assert [score["protocol"] for score in scores] == labels
    assert all(f"{label} " in out for label in labels)
    assert scores[0]["bits_per_byte"] == pytest.approx(last["ema_bits_per_byte"])
    assert len({score["bits_per_byte"] for score in scores}) == 3
    sample = (folder / "sample.txt").read_text()
    assert sample in out + "\n" and len(sample) >= 8
    # The weights that were written are those that were measured.
    file = folder / "checkpoints" / "last-ema.safetensors"
    status, out, err = lm(*options, "--eval-only", f"--checkpoint={file}")
    assert status == 0, err
    for score in scores:
        assert f"{score['bits_per_byte']:.4f} bits per byte" in out


def test_the_best_is_the_lowest(lm, tmp_path: Path):
    """A rate that spoils the model again: the best weights are those of an earlier epoch."""
    options = ["--optim.lr=0.3", "--sched.sched=constant", "--optim.clip_grad=null"]
    assert lm(*options, "--epochs=6", "--run.experiment=x")[0] == 0
    folder = tmp_path / "runs" / "x"
    figures = [record["bits_per_byte"] for record in records(folder)]
    header = folder / "checkpoints" / "best.safetensors"
    import safetensors

    with safetensors.safe_open(header, "pt") as file:
        about = file.metadata()
    assert int(about["epoch"]) == 1 + int(np.argmin(figures))
    assert float(about["bits_per_byte"]) == pytest.approx(min(figures), rel=1e-5)


def test_same_seed_same_run(lm, tmp_path: Path):
    for name, more in (("a", []), ("b", []), ("c", ["--seed=1"])):
        torch.manual_seed(hash(name) % 1000)
        assert lm(*more, "--model.drop=0.1", f"--run.experiment={name}")[0] == 0
    runs = tmp_path / "runs"
    assert records(runs / "a") == records(runs / "b") != records(runs / "c")
    assert same(runs / "a", runs / "b") and not same(runs / "a", runs / "c")
    texts = [(runs / name / "sample.txt").read_text() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]


def test_half_precision(lm):
    status, _, err = lm("--run.precision=bf16", *SHORTFORMER)
    assert status == 0, err


def test_another_optimiser(lm):
    assert lm("--optim.opt=sgd", "--optim.momentum=0.99", "--epochs=1", "--encoding=null")[0] == 0


@pytest.mark.parametrize(
    "options",
    [
        ["--encoding=rope", STAGED],
        ["--encoding=huang4,clip=4", "--segments={method: chunk, long_length: 64}"],
        ["--encoding=t5", "--model.drop=0.2", "--ema.enabled", "--ema.decay=0.5"],
        SHORTFORMER,
        ["--encoding=rope", "--order=stripes", "--memory=0.75"],
    ],
    ids=["staged", "segments", "dropout", "shortformer", "rope with memory"],
)
def test_an_interrupted_run_resumes_bit_for_bit(options, lm, tmp_path: Path, stopped):
    """In the middle of a stage, of a turn through the text, and of a stripe."""
    assert lm(*options, "--run.experiment=whole")[0] == 0
    with stopped(10):
        assert lm(*options, "--run.experiment=parts")[0] == 130
    status, _, err = lm(*options, "--run.experiment=parts", "--resume=auto")
    assert status == 0, err
    runs = tmp_path / "runs"
    assert records(runs / "whole") == records(runs / "parts")
    assert same(runs / "whole", runs / "parts")


@pytest.mark.parametrize("change", ["text", "longer", "tokenizer"])
def test_a_resumed_run_reads_the_text_it_began_with(change, lm, book, tmp_path, stopped):
    from training.text.corpus import Document
    from training.text.tokens import find_pairs

    own, text = tmp_path / "tokenizer.json", tmp_path / "book.txt"
    text.write_text(book.read_text())
    options = ["--run.experiment=parts", f"--data.root={text}"]
    if change == "tokenizer":
        find_pairs([Document("a", "abcdefgh" * 99)], 260).save(own)
        options += ["--data.tokens=bpe", f"--data.tokenizer={own}"]
    with stopped(10):
        assert lm(*options)[0] == 130
    if change == "tokenizer":
        find_pairs([Document("a", "hgfedcba" * 99)], 260).save(own)
    else:
        words = text.read_text()
        text.write_text(words.swapcase() if change == "text" else words + words[:2000])
    status, _, err = lm(*options, "--resume=auto")
    assert status == 2 and "tokens' changed" in err and "--allow-changed-data" in err
    if change == "tokenizer":  # of another size
        saved = own.read_text()
        find_pairs([Document("a", "ab" * 99)], 258).save(own)
        status, _, err = lm(*options, "--resume=auto", "--allow-changed-data")
        assert status == 2 and "state does not fit the model" in err
        own.write_text(saved)
    status, _, err = lm(*options, "--resume=auto", "--allow-changed-data")
    assert status == 0 and "tokens' changed" in err


# --- what a step reads ----------------------------------------------------------------------------


@pytest.fixture
def parts(monkeypatch):
    """The batches of all steps, as the task hands them to the model."""
    seen, real = [], Language.loss

    def loss(self, model, batch, step):
        result = real(self, model, batch, step)
        seen.append((step, batch, result))
        return result

    monkeypatch.setattr(Language, "loss", loss)
    return seen


def test_stages(lm, parts):
    """The same tokens a step throughout; the switch is where the plan says."""
    assert lm(STAGED)[0] == 0
    shapes = [tuple(batch.batch.input_ids.shape) for _, batch, _ in parts]
    assert shapes == [(16, 8)] * 5 + [(8, 16)] * 7
    assert all(result.units == 128 for _, _, result in parts)


def test_the_optimiser_and_the_schedule_go_on_across_the_switch(lm, tmp_path: Path, monkeypatch):
    optimisers, rates, real = [], [], Loop._one_step

    def step(self, *given):
        optimisers.append(id(self.context.optimizer))
        rates.append(self.context.optimizer.param_groups[0]["lr"])
        return real(self, *given)

    monkeypatch.setattr(Loop, "_one_step", step)
    assert lm(STAGED)[0] == 0
    staged = rates.copy()
    rates.clear()
    assert lm("--run.experiment=plain")[0] == 0
    assert len(set(optimisers[:12])) == 1
    assert staged == rates and len(set(rates)) > 8
    state = newest_state(tmp_path / "runs/lm-rope-seed0")
    steps = {int(group["step"]) for group in state["optimizer"]["state"].values()}
    assert steps == {12}


def test_segments(lm, parts):
    assert lm("--segments={method: chunk, long_length: 64, alpha: 0.5}", "--encoding=rope")[0] == 0
    for _, part, _ in parts:
        batch = part.batch
        assert batch.input_ids.shape == (8, 16)
        assert batch.position_ids.max() < 64
        jumps = (batch.position_ids.diff() > 1).sum(1)
        assert jumps.max() <= 1
        assert torch.equal(batch.labels[:, :7], batch.input_ids[:, 1:8])
    assert any((part.batch.position_ids.diff() > 1).any() for _, part, _ in parts)
    parts.clear()
    assert lm("--segments={method: prefix, long_length: 64}", "--encoding=alibi")[0] == 0
    for _, part, result in parts:
        assert part.count == result.count == int((part.batch.labels != IGNORE).sum()) == 8 * 4
        assert result.units == 128


def test_stripes_go_on_and_memories_with_them(lm, parts):
    assert lm(*SHORTFORMER, "--epochs=5")[0] == 0
    before = None
    for step, part, _ in parts:
        batch = part.batch
        assert batch.reset == (step in (0, 5)), step  # a new stage starts from the beginning
        if not batch.reset:
            assert torch.equal(batch.input_ids[:, 0], before.labels[:, -1])
        before = batch


def task_of(accumulate: int = 1, memory: float = 1.0) -> tuple[Language, CausalLM]:
    from accelerate import Accelerator

    from training.text.options import StageConfig
    from training.text.staged import TextPlan

    torch.manual_seed(0)
    stream = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8)
    accelerator = Accelerator(cpu=True)
    config = LmConfig(
        steps_per_epoch=9, grad_accum_steps=accumulate, memory=memory, eval_batch_size=2,
        epochs=1, budget=64, stages=(StageConfig(length=16),), order="stripes",
    )  # fmt: skip
    plan = TextPlan(5000, config)
    held = Held(config, accelerator, stream[:100], ByteTokens.byte_counts, 16)
    model = CausalLM(256, "pia", dim=16, depth=2, num_heads=2)
    streams = [stream, stream[:100]]
    return Language(config, accelerator, model, held, ByteTokens(), plan, streams), model


def test_accumulated_parts_have_memories_of_their_own():
    """Two passes a step give the loss of one, step by step, and carry the same."""
    one, model = task_of()
    two, _ = task_of(accumulate=2)
    halves = two.batches(0)
    for step, part in enumerate(one.batches(0)):
        whole = one.loss(model, part, step).loss.item()
        own = [two.loss(model, next(halves), step).loss.item() for _ in range(2)]
        assert sum(own) / 2 == pytest.approx(whole, rel=1e-6)
    for a, b in zip(one.carried()["layers"], two.carried()["layers"], strict=True):
        torch.testing.assert_close(a, b)
    again, _ = task_of(accumulate=2)
    again.restore(one.carried())
    for mine, other in zip(again.states, two.states, strict=True):
        for a, b in zip(mine.layers, other.layers, strict=True):
            torch.testing.assert_close(a.inputs, b.inputs)


def test_two_processes_are_one_run(tmp_path: Path, book: Path):
    """Stripes, memories and evaluation split over two: the results of one, to rounding."""
    results = []
    for processes in (1, 2):
        name = f"of{processes}"
        arguments = [*TINY, *SHORTFORMER, f"--data.root={book}", "--run.device=cpu"]
        arguments += ["--epochs=3", "--optim.opt=sgd", f"--run.output={tmp_path}"]
        output = launch(processes, ROOT / "train_lm.py", *arguments, f"--run.experiment={name}")
        assert "".join(output).count("run directory:") == 1
        scores = json.loads((tmp_path / name / "scores.json").read_text())
        state = newest_state(tmp_path / name)
        results.append((records(tmp_path / name), scores, state["carried"]["task"]))
    (one, scores, carried), (two, other_scores, other_carried) = results
    for a, b in zip(one, two, strict=True):
        assert (a["step"], a["tokens"], a["protocol"]) == (b["step"], b["tokens"], b["protocol"])
        for key in ("train_loss", "bits_per_byte"):
            assert b[key] == pytest.approx(a[key], rel=1e-4), key
    for a, b in zip(scores, other_scores, strict=True):
        assert b["bits_per_byte"] == pytest.approx(a["bits_per_byte"], rel=1e-4)
    for a, b in zip(carried["layers"], other_carried["layers"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# --- starting from weights ------------------------------------------------------------------------


def test_an_encoding_joins_a_trained_model(lm, tmp_path: Path):
    base = ["--encoding=learned,length=16", "--epochs=1"]
    assert lm(*base, "--run.experiment=base")[0] == 0
    runs = tmp_path / "runs"
    file = runs / "base" / "checkpoints" / "last.safetensors"
    joined = [*base, "--attach=huang4,clip=4"]
    status, out, err = lm(*joined, "--eval-only", f"--checkpoint={file}")
    assert status == 0, err
    score = json.loads((runs / "base" / "scores.json").read_text())[0]
    assert f"{score['bits_per_byte']:.4f} bits per byte" in out
    assert lm(*joined, f"--checkpoint={file}", "--run.experiment=on")[0] == 0
    after = weights(runs / "on")
    assert after["body.blocks.0.attn.huang.table"].abs().max() > 0
    file = runs / "on" / "checkpoints" / "last.safetensors"
    status, out, err = lm(*joined, "--eval-only", f"--checkpoint={file}")
    score = json.loads((runs / "on" / "scores.json").read_text())[0]
    assert f"{score['bits_per_byte']:.4f} bits per byte" in out


def test_an_interpolated_table_is_read_from_a_shorter_one(lm, tmp_path: Path):
    assert lm("--encoding=learned,length=16", "--epochs=1", "--run.experiment=base")[0] == 0
    file = tmp_path / "runs" / "base" / "checkpoints" / "last.safetensors"
    status, out, err = lm(
        "--encoding=learned,length=16,interpolate=left,to=64", "--eval-only",
        f"--checkpoint={file}",
        "--protocols=[{length: 64}]",
    )  # fmt: skip
    assert status == 0, err
    assert "non-overlapping, window 64" in out


def test_byte_pairs_and_a_folder_that_keeps_them(lm, tmp_path: Path):
    pytest.importorskip("tokenizers")
    kept = tmp_path / "kept"
    options = ["--data.tokens=bpe", "--data.vocab_size=300", f"--data.folder={kept}"]
    status, _, err = lm(*options, "--epochs=1", "--run.experiment=a")
    assert status == 0, err
    names = {path.name.rsplit("-", 2)[0] + path.suffix for path in kept.iterdir()}
    assert names == {"bpe-300.json", "train-300.bin", "validation-300.bin"}
    times = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    assert lm(*options, "--epochs=1", "--run.experiment=b")[0] == 0
    assert {path.name: path.stat().st_mtime_ns for path in kept.iterdir()} == times
    assert same(tmp_path / "runs" / "a", tmp_path / "runs" / "b")
    figures = records(tmp_path / "runs" / "a")[0]
    assert figures["bits_per_byte"] < figures["loss"] / np.log(2)  # a token is more than a byte
    status, out, _ = lm(*options, "--data.separator=~~")
    assert status == 0 and "created again" in out
    assert len(list(kept.glob("train-300-*.bin"))) == 1  # the outdated one is removed


# --- bad input ------------------------------------------------------------------------------------

BAD = [
    (["--encoding=ropee"], ["'ropee'", "rope"]),
    (["--encoding=rope-axial"], ["rope-axial is for images"]),
    (["--encoding=rope", "--model.dim=6"], ["head_dim=3", "even"]),
    (["--model.num_heads=3"], ["dim=16", "num_heads=3"]),
    (["--model.dim=0"], ["model.dim: 0"]),
    (["--model.drop=1"], ["model.drop: 1"]),
    (["--encoding=learned,length=15"], ["15 rows", "16 positions", "interpolate=left,to=16"]),
    (
        ["--encoding=learned,length=16", "--protocols=[{length: 32}]"],
        ["16 rows", "32 positions"],
    ),
    (
        ["--encoding=learned,length=16", "--segments={method: chunk, long_length: 64}"],
        ["16 rows", "64 positions"],
    ),
    (["--encod=rope"], ["unknown key 'encod'", "'encoding'"]),
    (["--stages=[{lenght: 16}]"], ["unknown key 'lenght' in 'stages'", "length, until"]),
    (["--stages=[{length: 24}]"], ["24", "128"]),
    (["--stages=[{length: 16, until: 5}]"], ["stages"]),
    (["--stages=[]"], ["stages: at least one"]),
    (["--protocols=[]"], ["protocols: at least one"]),
    (["--protocols=[{kind: sliding}]"], ["protocol.stride"]),
    (["--eval_tokens=10"], ["eval_tokens: 10", "16"]),
    (["--budget=32768", "--stages=[{length: 32768}]"], ["32768"]),
    (["--steps_per_epoch=0"], ["steps_per_epoch: 0"]),
    (["--memory=1"], ["memory: 1.0 has no effect with order: shuffled", "order: stripes"]),
    (["--memory=1", "--order=stripes", "--encoding=sinusoidal"], ["sinusoidal", "pia or rope"]),
    (["--protocols=[{memory: true}]", "--encoding=learned,length=99"], ["learned", "pia or rope"]),
    (["--order=stripes", "--segments={method: full, long_length: 32}"], ["stripes"]),
    (["--segments={method: chunk}"], ["long_length"]),
    (["--grad_accum_steps=3"], ["3"]),
    (["--optim.lr=null"], ["optim.lr is not set"]),
    (["--data.root=/nowhere"], ["/nowhere"]),
    (["--data.name=book"], ["'book'", "stdlib, files"]),
    (["--data.name=hfds/x"], ["data.root", "hfds/x"]),
    (["--split=dev"], ["split", "validation"]),
    (["--eval-only"], ["eval_only needs checkpoint"]),
    (["--eval-only", "--checkpoint=/nowhere.pth"], ["'/nowhere.pth' is not a file"]),
    (["--model.pretrained=/nowhere"], ["model.pretrained", "it needs task: questions"]),
    (["--temperature=-1"], ["temperature: -1"]),
    (["--run.device=gpu"], ["run.device", "cpu"]),
]


@pytest.mark.parametrize(("arguments", "wanted"), BAD, ids=[" ".join(bad[0]) for bad in BAD])
def test_bad_input_is_one_line(arguments: list[str], wanted: list[str], lm, tmp_path: Path):
    status, out, err = lm(*arguments)
    assert_one_line(status, err, *wanted)
    assert out == ""
    assert not (tmp_path / "runs").exists()


def test_empty_and_binary_files(lm, tmp_path: Path):
    for content, word in ((b"", "empty"), (b"\x80\x81\x82" * 99, "not text"), (b"short", "5 char")):
        (tmp_path / "file").write_bytes(content)
        status, _, err = lm(f"--data.root={tmp_path / 'file'}")
        assert status == 2
        assert word in err and err.count("\n") == 1, err


def test_a_checkpoint_of_another_encoding(lm, tmp_path: Path):
    assert lm("--epochs=1", "--run.experiment=x")[0] == 0
    file = tmp_path / "runs" / "x" / "checkpoints" / "last.safetensors"
    status, _, err = lm("--eval-only", f"--checkpoint={file}", "--encoding=shaw,clip=4")
    assert status == 2
    assert "shaw.table_k" in err and "encoding" in err


def test_non_finite_loss_stops_the_run(lm, monkeypatch):
    real = Language.loss

    def loss(self, model, batch, step):
        result = real(self, model, batch, step)
        result.loss = result.loss * (float("nan") if step == 4 else 1)
        return result

    monkeypatch.setattr(Language, "loss", loss)
    status, _, err = lm()
    assert status == 2
    assert "the loss became nan in epoch 2, by step 5" in err


def test_a_memory_of_a_model_that_cannot_have_one():
    task, _ = task_of()
    other = CausalLM(256, "sinusoidal", dim=16, depth=1, num_heads=2)
    with pytest.raises(irpe.IrpeError, match="pia or rope"):
        task.loss(other, next(task.batches(0)), 0)


def test_a_later_list_is_whole(tmp_path: Path):
    """Nothing of the list in the file stays, where both have as many entries."""
    file = tmp_path / "a.yaml"
    file.write_text("stages: [{length: 8, until: 0.5}, {length: 16, until: 0.7}, {length: 32}]\n")
    given = ["--config", str(file), "--stages=[{length: 4}, {length: 4}, {length: 4}]"]
    assert [stage.until for stage in parse(LmConfig, given, "x").stages] == [None] * 3


def test_help():
    command = [sys.executable, str(ROOT / "train_lm.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0
    for option in ("--encoding", "--stages", "--segments.method", "--memory", "--questions.length"):
        assert option in done.stdout
