"""train_det.py from end to end: artefacts, reproducibility, evaluation, bad input."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cls_command import ROOT
from damaged import DAMAGED, KINDS, damage
from PIL import Image
from processes import launch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from run_files import assert_one_line, files, newest_state, records, same

from irpe.files.read import read_weights
from training.data.scenes import Scenes, make_scenes
from training.det.average_precision import NAMES
from training.det.detect import Detect

K = "rpe-2.0-product-ctx-1-k"
TINY = [
    "--backbone=stem",
    "--pretrained_backbone=false",
    "--hidden_dim=16",
    "--nheads=2",
    "--enc_layers=1",
    "--dec_layers=2",
    "--dim_feedforward=16",
    "--num_queries=4",
    "--aug.scales=[32, 40]",
    "--aug.crop_scales=[32, 48]",
    "--aug.crop_size=[24, 40]",
    "--aug.eval_size=48",
    "--data.workers=0",
    "--epochs=2",
    "--batch_size=8",
    "--lr=1e-3",
    "--lr_backbone=1e-3",
    "--run.progress=none",
    "--run.threads=1",
    "--pictures=3",
]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "set"
    make_scenes(folder, Scenes(train=24, held_out=10))
    return folder


def coco(folder: Path) -> list[str]:
    return ["--data.name=coco"] + [
        option
        for part in ("train", "val")
        for option in (
            f"--data.{part}_images={folder / part}",
            f"--data.{part}_annotations={folder / 'annotations' / f'instances_{part}.json'}",
        )
    ]


@pytest.fixture
def det(tmp_path: Path, capsys: pytest.CaptureFixture, scenes: Path):
    """Return ``run(*arguments) -> (status, output, errors)`` of train_det.py, in this process."""
    import train_det

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        output = f"--run.output={tmp_path / 'runs'}"
        status = train_det.main([*TINY, *coco(scenes), output, *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


# --- a run -------------------------------------------------------------------------------------


def test_a_run_leaves_everything(det, tmp_path: Path, scenes: Path):
    status, out, err = det(f"--enc_rpe2d={K}", "--ema.enabled", "--run.progress=lines")
    assert status == 0, err
    folder = tmp_path / "runs" / f"detr-stem-{K}-seed0"
    assert f"run directory: {folder}" in out
    assert "held-out AP" in out
    assert "epoch 2/2" in err
    found = files(folder)
    assert found == {
        "config.yaml",
        "metrics.jsonl",
        "curves.png",
        "tables.png",
        "precision_recall.png",
        "detections.png",
        "detections.json",
        "checkpoints/best.safetensors",
        "checkpoints/last.safetensors",
        "checkpoints/last-ema.safetensors",
        "checkpoints/state-epoch1-step3.pt",
        "checkpoints/state-epoch2-step6.pt",
        "progress.json",
    }
    first, last = records(folder)
    assert last["count"] == last["ema_count"] == 10
    assert last["train_loss"] < first["train_loss"]
    for name in NAMES:
        assert name in last and f"ema_{name}" in last
    assert last["train_loss_ce"] > 0 and last["loss_giou"] > 0
    # Evaluating the file of detections gives the results of the run.
    truth = COCO(scenes / "annotations" / "instances_val.json")
    evaluation = COCOeval(truth, truth.loadRes(str(folder / "detections.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    for name, value in zip(NAMES, evaluation.stats, strict=True):
        shown = last[f"ema_{name}"]
        assert (shown is None and value == -1) or shown == pytest.approx(value), name
    # The weights that were written are those that were measured.
    file = folder / "checkpoints" / "last.safetensors"
    status, out, err = det("--eval-only", f"--checkpoint={file}", f"--enc_rpe2d={K}")
    assert status == 0, err
    assert f"AP {100 * last['AP']:.1f}, AP50 {100 * last['AP50']:.1f} (10 images)" in out
    shown = [line for line in out.splitlines() if line.startswith(" Average ")]
    assert len(shown) == 12 and shown[0].endswith(f"= {last['AP']:.3f}")


def test_same_seed_same_run(det, tmp_path: Path):
    for name, more in (("a", []), ("b", ["--data.workers=2"]), ("c", ["--seed=1"])):
        torch.manual_seed(hash(name) % 1000)
        assert det(*more, f"--run.experiment={name}", "--dropout=0.1")[0] == 0
    runs = tmp_path / "runs"
    assert records(runs / "a") == records(runs / "b")
    assert records(runs / "a") != records(runs / "c")
    assert same(runs / "a", runs / "b", "last")


def test_an_interrupted_run_resumes(det, tmp_path: Path, stopped):
    options = ["--lr_drop=1", f"--enc_rpe2d=[{K}]"]
    assert det(*options, "--run.experiment=whole")[0] == 0
    with stopped(4):
        assert det(*options, "--run.experiment=parts", "--run.save_steps=1")[0] == 130
    state = newest_state(tmp_path / "runs" / "parts")
    assert (state["step"], state["within"]) == (4, 1)
    assert det(*options, "--run.experiment=parts", "--resume=auto")[0] == 0
    runs = tmp_path / "runs"
    assert records(runs / "whole") == records(runs / "parts")
    assert records(runs / "whole")[1]["lr"] == pytest.approx(1e-4)  # fell after the first epoch
    assert same(runs / "whole", runs / "parts", "last")


def test_released_files_with_frozen_norms_and_a_real_backbone(det, tmp_path: Path):
    """The form of the published files, and learning rates of zero."""
    from models.detr import build_detr

    options = {"hidden_dim": 16, "nheads": 2, "enc_layers": 1, "dec_layers": 2}
    torch.manual_seed(0)
    model = build_detr(
        num_classes=10, num_queries=4, backbone="resnet18", dim_feedforward=16, **options
    )
    released = {"model": model.state_dict(), "args": argparse.Namespace(lr=1e-4)}
    torch.save(released, tmp_path / "released.pth")
    given = [f"--checkpoint={tmp_path / 'released.pth'}", "--backbone=resnet18"]
    status, out, err = det("--eval-only", *given)
    assert status == 0, err
    assert "10 images" in out
    assert det(*given, "--epochs=1", "--lr_backbone=0", "--run.experiment=x")[0] == 0
    after = read_weights(tmp_path / "runs" / "x" / "checkpoints" / "last.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(after[name], value) == name.startswith("backbone."), name


def test_half_precision(det, tmp_path: Path):
    assert det("--run.precision=bf16", "--epochs=1")[0] == 0


def test_accumulation(det, tmp_path: Path):
    for name, more in (("one", []), ("two", ["--grad_accum_steps=2"])):
        options = ["--dropout=0", "--aug.enabled=false", "--epochs=1", f"--run.experiment={name}"]
        assert det(*options, *more)[0] == 0
    one, two = (records(tmp_path / "runs" / name)[0] for name in ("one", "two"))
    assert one["step"] == two["step"] == 3


def test_two_processes_give_the_numbers_of_one(det, scenes: Path, tmp_path: Path):
    """Trained together and evaluated together; nine held-out images do not part evenly."""
    file = scenes / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    content["images"] = content["images"][:9]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    (tmp_path / "nine.json").write_text(json.dumps(content))
    arguments = [*TINY, *coco(scenes), f"--data.val_annotations={tmp_path / 'nine.json'}"]
    arguments += ["--run.device=cpu", f"--run.output={tmp_path}", "--run.experiment=both"]
    launch(2, ROOT / "train_det.py", *arguments, "--epochs=1", "--eval_batch_size=2")
    (record,) = records(tmp_path / "both")
    assert record["count"] == 9 and record["step"] == 3
    weights = tmp_path / "both" / "checkpoints" / "last.safetensors"
    alone = launch(1, ROOT / "train_det.py", *arguments, "--eval-only", f"--checkpoint={weights}")
    rows = [line.split() for line in alone[0].splitlines() if line.startswith(" Average ")]
    for name, (*_, shown) in zip(NAMES, rows, strict=True):
        value = -1 if record[name] is None else record[name]
        assert float(shown) == pytest.approx(value, abs=6e-4), name


# --- bad input -----------------------------------------------------------------------------------


def copied(scenes: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(scenes, tmp_path / "copy"))


def test_nothing_is_lost_of_what_is_left_out(det, scenes: Path, tmp_path: Path):
    folder = copied(scenes, tmp_path)
    file = folder / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    images = content["images"]
    (folder / "train" / images[0]["file_name"]).unlink()
    (folder / "train" / images[1]["file_name"]).write_bytes(b"no image")
    Image.new("L", (64, 64)).save(folder / "train" / images[2]["file_name"])
    bad = next(a for a in content["annotations"] if a["image_id"] == images[3]["id"])
    bad["bbox"] = [3, 4, 0, 5]
    for annotation in content["annotations"]:
        if annotation["image_id"] == images[4]["id"]:
            annotation["iscrowd"] = 1
    file.write_text(json.dumps(content))
    held = json.loads((folder / "annotations" / "instances_val.json").read_text())["images"]
    (folder / "val" / held[0]["file_name"]).write_bytes(b"")
    status, out, err = det(*coco(folder), "--run.experiment=x", "--batch_size=4")
    assert status == 0, err
    run = tmp_path / "runs" / "x"
    left_out = json.loads((run / "left_out.json").read_text())
    assert len(left_out) == 2
    assert any(images[0]["file_name"] in line for line in left_out)
    skipped = json.loads((run / "skipped.json").read_text())
    assert sorted(Path(name).name for name in skipped) == sorted(
        [images[1]["file_name"], held[0]["file_name"]]
    )
    assert "2 images did not decode" in out
    assert records(run)[-1]["count"] == 9
    for option in ("--data.on_bad_image=fail", "--data.on_bad_annotation=fail"):
        status, _, err = det(*coco(folder), option)
        assert status == 2
        assert err.count("\n") == 1


def test_images_that_are_damaged_or_odd(det, scenes: Path, tmp_path: Path):
    folder = copied(scenes, tmp_path)
    names = sorted((folder / "train").iterdir())
    for path, kind in zip(names, KINDS, strict=False):
        damage(path, kind)
    status, out, err = det(*coco(folder), "--run.experiment=x", "--run.progress=lines")
    assert status == 0, err
    skipped = json.loads((tmp_path / "runs" / "x" / "skipped.json").read_text())
    bad = [str(path) for path, kind in zip(names, KINDS, strict=False) if kind in DAMAGED]
    assert sorted(skipped) == bad and "5 images did not decode" in out
    for name in bad:
        assert len([line for line in err.splitlines() if name in line]) == 1


def test_non_finite_loss_stops_the_run_and_names_the_images(det, tmp_path: Path, monkeypatch):
    real = Detect.loss

    def loss(self, model, batch, step):
        result = real(self, model, batch, step)
        if step == 1:
            result.loss = result.loss * float("nan")
        return result

    monkeypatch.setattr(Detect, "loss", loss)
    status, _, err = det("--run.experiment=x")
    assert status == 2
    assert "the loss became nan in epoch 1, by step 2" in err
    noted = json.loads((tmp_path / "runs" / "x" / "nonfinite.json").read_text())
    assert str(tmp_path / "runs" / "x" / "nonfinite.json") in err
    assert [batch["step"] for batch in noted["batches"]] == [2]
    assert len(noted["batches"][0]["names"]) == 8
    assert not (tmp_path / "runs" / "x" / "checkpoints").exists()


BAD = [
    (["--enc_rpe2d=rpe-2.0-prodct-ctx-1-k"], ["prodct", "product"]),
    ([f"--enc_rpe2d=[{K}, {K}]"], ["2 specs", "1 layers"]),
    (["--enc_rpe=3"], ["unknown key 'enc_rpe'", "'enc_rpe2d'"]),
    (["--backbone=resnet51"], ["resnet51"]),
    (["--position_embedding=cosine"], ["position_embedding", "sine"]),
    (["--nheads=3"], ["16", "3"]),
    (["--data.train_images=/nowhere"], ["/nowhere"]),
    (["--data.train_annotations=/nowhere.json"], ["/nowhere.json"]),
    (["--data.train_images=null"], ["coco_path is not set"]),
    (["--aug.scales=[]"], ["scales"]),
    (["--aug.hflip=2"], ["hflip", "2"]),
    (["--batch_size=100"], ["batch_size: 100", "24 training images"]),
    (["--epochs=0"], ["epochs: 0"]),
    (["--lr_drop=0"], ["lr_drop: 0"]),
    (["--data.num_classes=4"], ["class 9", "4 classes"]),
    (["--eval-only"], ["eval_only needs checkpoint"]),
    (["--eval-only", "--checkpoint=/nowhere.pth"], ["'/nowhere.pth' is not a file"]),
]


@pytest.mark.parametrize(("arguments", "parts"), BAD, ids=[" ".join(bad[0]) for bad in BAD])
def test_bad_input_is_one_line(arguments: list[str], parts: list[str], det):
    status, out, err = det(*arguments)
    assert_one_line(status, err, *parts)
    assert out == ""


def test_a_checkpoint_of_another_encoding(det, tmp_path: Path):
    assert det("--epochs=1", "--run.experiment=plain")[0] == 0
    file = tmp_path / "runs" / "plain" / "checkpoints" / "last.safetensors"
    status, _, err = det("--eval-only", f"--checkpoint={file}", f"--enc_rpe2d={K}")
    assert status == 2
    assert "has no encoding there; give the encoding that it was trained with" in err
    assert "enc_rpe2d" in err


def test_help():
    command = [sys.executable, str(ROOT / "train_det.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0
    for option in ("--enc_rpe2d", "--lr_drop", "--coco_path", "--set_cost_giou", "--resume"):
        assert option in done.stdout
