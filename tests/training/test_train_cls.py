"""train_cls.py from end to end: artefacts, reproducibility, evaluation, bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from cls_command import ROOT, TINY
from run_files import assert_one_line, files, newest_state, records, weights

import irpe
from training import config
from training.cls.options import ClsConfig
from training.loop import Loop

RPE = "rpe-2.0-product-ctx-1-k"


# --- a run -------------------------------------------------------------------------------------


def test_a_run_leaves_everything(cls, tmp_path: Path):
    status, out, err = cls(f"--rpe={RPE}", "--ema.enabled", "--run.progress=lines")
    assert status == 0, err
    folder = tmp_path / "runs" / f"vit_tiny_patch16_224-{RPE}-seed0"
    assert f"run directory: {folder}" in out
    assert "held-out accuracy" in out
    assert "epoch 2/2" in err
    assert "images/s" in err
    assert "left" in err
    found = files(folder)
    assert found == {
        "config.yaml",
        "metrics.jsonl",
        "curves.png",
        "tables.png",
        "checkpoints/best.safetensors",
        "checkpoints/last.safetensors",
        "checkpoints/last-ema.safetensors",
        "checkpoints/state-epoch1-step5.pt",
        "checkpoints/state-epoch2-step10.pt",
        "progress.json",
    }
    first, last = records(folder)
    assert (first["epoch"], last["epoch"]) == (1, 2)
    assert last["count"] == last["ema_count"] == 360
    for key in ("train_loss", "train_top1", "loss", "top1", "top5", "lr"):
        assert isinstance(last[key], float), key
    for key in ("seconds", "images_per_second", "train_cpu_seconds"):
        assert f'"{key}": ' in (folder / "metrics.jsonl").read_text()
    assert last["train_loss"] < first["train_loss"]
    assert last["step"] == 2 * (1437 // 256)
    state = newest_state(folder)
    assert (state["epoch"], state["step"]) == (2, 10)
    resolved = config.parse(ClsConfig, ["--config", str(folder / "config.yaml")], "x")
    assert resolved.rpe == RPE
    assert resolved.epochs == 2

    # The weights that were written are those that were measured.
    for name, prefix in (("last", ""), ("last-ema", "ema_")):
        file = folder / "checkpoints" / f"{name}.safetensors"
        status, out, err = cls("--eval-only", f"--checkpoint={file}", f"--rpe={RPE}")
        assert status == 0, err
        assert f"{100 * last[f'{prefix}top1']:.2f} %" in out


def test_the_bar_shows_loss_accuracy_speed_and_time_left(cls):
    status, _, err = cls("--run.progress=bar", "--epochs=1")
    assert status == 0
    shown = err.replace("\r", "\n").splitlines()
    full = [line for line in shown if line.startswith("epoch 1/1 100%")]
    assert full, shown
    assert all(word in full[-1] for word in ("loss", "top1", "images/s", "left"))


def test_same_seed_same_run_another_seed_another(cls, tmp_path: Path):
    mix = ["--aug.mixup=0.8", "--aug.cutmix=1.0", "--model.drop_path=0.2", "--aug.reprob=0.3"]
    common = [*mix, f"--rpe={RPE}", "--batch_size=128"]
    for name, more in (
        ("a", []),
        ("b", ["--data.workers=2"]),
        ("c", ["--seed=1"]),
    ):
        torch.manual_seed(hash(name) % 1000)  # what ran before must not matter
        assert cls(*common, f"--run.experiment={name}", *more)[0] == 0
    runs = tmp_path / "runs"
    assert records(runs / "a") == records(runs / "b")
    assert records(runs / "a") != records(runs / "c")
    a, b, c = (weights(runs / name) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["head.weight"], c["head.weight"])


def test_a_taken_folder_is_never_overwritten(cls, tmp_path: Path):
    for name in ("one", "one-2", "one-3"):
        assert f"{name}\n" in cls("--run.experiment=one", "--epochs=1")[1]
        assert len(records(tmp_path / "runs" / name)) == 1


def test_accumulation_is_the_same_step(cls, tmp_path: Path):
    common = ["--epochs=1", "--aug.enabled=false", "--optim.opt=sgd", "--optim.lr=0.1"]
    assert cls(*common, "--run.experiment=whole")[0] == 0
    assert cls(*common, "--grad_accum_steps=4", "--run.experiment=parts")[0] == 0
    whole, parts = (records(tmp_path / "runs" / name)[0] for name in ("whole", "parts"))
    assert whole["step"] == parts["step"]
    assert whole["loss"] == pytest.approx(parts["loss"], rel=1e-5)


def test_bf16_compile_free_options(cls, tmp_path: Path):
    status, _, err = cls(
        "--run.precision=bf16",
        "--optim.clip_grad=1.0",
        "--optim.layer_decay=0.9",
        "--model.grad_checkpointing",
        "--run.save_every=2",
        f"--rpe={RPE}",
    )
    assert status == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    assert records(folder)[-1]["train_loss"] < records(folder)[0]["train_loss"]


def test_image_folder_with_a_bad_file(cls, folder: Path, tmp_path: Path):
    bad = folder / "train" / "ant" / "2.png"
    bad.write_bytes(bad.read_bytes()[:40])
    also = folder / "val" / "bee" / "0.png"
    also.write_bytes(b"")
    images = ["--data.name=folder", f"--data.root={folder}", "--model.in_chans=3", "--batch_size=4"]
    status, out, err = cls(*images, "--run.experiment=x", "--run.progress=lines")
    assert status == 0, err
    assert "2 images did not decode" in out
    for name in (bad, also):
        assert len([line for line in err.splitlines() if str(name) in line]) == 1
    skipped = json.loads((tmp_path / "runs" / "x" / "skipped.json").read_text())
    assert sorted(skipped) == sorted([str(bad), str(also)])
    assert records(tmp_path / "runs" / "x")[-1]["count"] == 9

    status, _, err = cls(*images, "--data.on_bad_image=fail")
    assert status == 2
    assert err.count("\n") == 1
    assert str(bad) in err or str(also) in err


def test_eval_only_of_a_released_file(cls, tmp_path: Path):
    """The form of the published files: weights and options, in one pickle."""
    import argparse

    kwargs = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, in_chans=1, num_classes=10, **kwargs
    )
    irpe.attach(model, RPE)
    released = {"model": model.state_dict(), "args": argparse.Namespace(lr=5e-4)}
    torch.save(released, tmp_path / "released.pth")
    checkpoint = f"--checkpoint={tmp_path / 'released.pth'}"
    status, out, err = cls("--eval-only", checkpoint, f"--rpe={RPE}")
    assert status == 0, err
    assert "of 360 wrong" in out
    assert not (tmp_path / "runs").exists()
    status, _, err = cls("--eval-only", checkpoint)
    assert status == 2
    assert "blocks.0.attn.rpe_k.lookup_table_weight" in err
    assert "without the spec of their encoding" in err


def test_non_finite_loss_stops_the_run(cls, tmp_path: Path):
    status, _, err = cls("--optim.opt=sgd", "--optim.lr=1e30", "--run.experiment=x")
    assert status == 2
    assert "the loss became nan in epoch 1, by step 2, at a learning rate of 9.76e+29" in err
    assert not (tmp_path / "runs" / "x" / "checkpoints").exists()


# --- bad input -----------------------------------------------------------------------------------

BAD = [
    # arguments, and what the one line must contain
    (["--epoch=3"], ["unknown key 'epoch'", "'epochs'"]),
    (["--model.name=vit_tinny_patch16_224"], ["'vit_tinny_patch16_224'", "vit_tiny_patch16_224"]),
    (["--model.name=vit_tiny_patch16_224.nope"], ["no weights 'nope'", "augreg_in21k"]),
    (["--model.kwargs.width=3"], ["cannot be built", "width"]),
    (["--rpe=rpe-2.0-prodct-ctx-1-k"], ["prodct", "product"]),
    (["--rpe=rpe-2.0-product-ctx-1-K"], ["K"]),
    ([f"--rpe={RPE}", "--rpe_where=layers.*"], ["layers.*", "blocks.0.attn"]),
    ([f"--rpe={RPE}", "--rpe_backend=cuda"], ["cuda", "reference"]),
    (
        [f"--rpe={RPE}", "--model.name=resnet18", "--model.kwargs={}", "--model.img_size=null"],
        ["ResNet"],
    ),
    (["--data.name=folder"], ["data.root is not set"]),
    (["--data.name=folder", "--data.root=/nowhere/at/all"], ["'/nowhere/at/all' does not exist"]),
    (["--data.mean=[0.5, 0.5, 0.5]"], ["data.mean", "3 values", "model.in_chans is 1"]),
    (["--data.workers=-1"], ["data.workers: -1"]),
    (["--model.num_classes=7"], ["class 9", "7 classes"]),
    (["--epochs=0"], ["epochs: 0"]),
    (["--batch_size=0"], ["batch_size: 0"]),
    (["--batch_size=5000"], ["batch_size: 5000", "1437 training images"]),
    (["--grad_accum_steps=3"], ["batch_size: 256", "3 accumulated"]),
    (["--batch_size=255", "--aug.mixup=0.5"], ["even batch", "255"]),
    (["--aug.aa=rnd-m9"], ["'rnd-m9'", "rand-m9"]),
    (["--optim.opt=adamx2"], ["'adamx2'", "adamw"]),
    (["--run.threads=0"], ["run.threads: 0"]),
    (["--run.precision=fp16", "--run.device=cpu"], ["fp16 needs a GPU"]),
    (["--eval-only"], ["eval_only needs checkpoint"]),
    (["--eval-only", "--checkpoint=/nowhere.pth"], ["'/nowhere.pth' is not a file"]),
]


@pytest.mark.parametrize(("arguments", "parts"), BAD, ids=[" ".join(bad[0]) for bad in BAD])
def test_bad_input_is_one_line(arguments: list[str], parts: list[str], cls, tmp_path: Path):
    status, out, err = cls(*arguments)
    assert_one_line(status, err, *parts)
    assert out == ""


@pytest.mark.parametrize("where", ["file", "proc"])
def test_output_that_cannot_be_written(where: str, cls, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    output = tmp_path / "file" / "runs" if where == "file" else Path("/proc/irpe-runs")
    if where == "proc" and not Path("/proc/self").exists():
        pytest.skip("no /proc here")
    status, _, err = cls(f"--run.output={output}")
    assert status == 2
    assert err.count("\n") == 1
    assert str(output) in err
    assert "cannot write" in err


def test_classes_that_differ_between_the_splits(cls, folder: Path):
    (folder / "val" / "bee").rename(folder / "val" / "cow")
    status, _, err = cls("--data.name=folder", f"--data.root={folder}", "--model.in_chans=3")
    assert status == 2
    assert "only in training: bee" in err
    assert "only held out: cow" in err


def test_errors_of_the_program_keep_their_traceback(cls, monkeypatch):
    monkeypatch.setattr(Loop, "fit", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cls()


@pytest.mark.parametrize(
    ("arguments", "status", "part"),
    [
        (["--modle=3"], 2, "error: unknown key 'modle'"),
        (["--help"], 0, "--rpe RPE"),
    ],
)
def test_the_command_itself(arguments: list[str], status: int, part: str, tmp_path: Path):
    command = [sys.executable, str(ROOT / "train_cls.py"), *TINY, *arguments]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == status, done.stderr
    assert part in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
