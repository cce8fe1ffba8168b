"""train_cls.py --eval-only --sizes: a trained model at other sizes."""

import json
from pathlib import Path

import pytest
import timm
import torch

import irpe
from irpe.files.read import read_weights
from training import config
from training.cls.model import input_settings, make_transform
from training.cls.options import ClsConfig
from training.cls.sizes import parse_sizes
from training.data.sources import open_source
from training.errors import UserError

RPE = "rpe-2.0-product-ctx-1-k"
ARGS = {"img_size": 8, "in_chans": 1, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


def accuracy(weights, size):
    """By hand, all images at once."""
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=10, dynamic_img_size=True, **ARGS
    ).eval()
    irpe.attach(model, RPE)
    model.load_state_dict(weights)
    options = ClsConfig()
    options.model.in_chans = 1
    settings = input_settings(options, model)
    settings["input_size"] = (1, *size)
    transform = make_transform(options.aug, settings, training=False)
    source = open_source("digits", None, "validation", training=False, in_chans=1)
    samples = [source.read(index) for index in range(len(source))]
    images = torch.stack([transform(image) for image, _ in samples])
    assert images.shape == (360, 1, *size)
    with torch.no_grad():
        found = model(images).argmax(1)
    return float((found == torch.tensor([label for _, label in samples])).double().mean())


@pytest.mark.full
def test_table_curve_and_figures(cls, tmp_path: Path):
    status, _, err = cls(f"--rpe={RPE}", "--epochs=3")
    assert status == 0, err
    run = tmp_path / "runs" / f"vit_tiny_patch16_224-{RPE}-seed0"
    file = run / "checkpoints" / "last.safetensors"
    evaluation = ["--eval-only", f"--checkpoint={file}", f"--rpe={RPE}"]
    _, plain, _ = cls(*evaluation)
    status, out, err = cls(*evaluation, "--sizes", "8,12,8x16,16x8")
    assert status == 0, err
    folder = tmp_path / "runs" / f"vit_tiny_patch16_224-{RPE}-sizes"
    assert f"run directory: {folder}" in out
    assert {p.name for p in folder.iterdir()} == {"config.yaml", "sizes.json", "sizes.png"}
    content = json.loads((folder / "sizes.json").read_text())
    assert content["trained"] == [8, 8]
    records = {(r["height"], r["width"]): r for r in content["sizes"]}
    assert list(records) == [(8, 8), (12, 12), (8, 16), (16, 8)]
    weights = read_weights(str(file))
    for size, record in records.items():
        name = "x".join(map(str, size))
        (line,) = (row for row in out.splitlines() if row.split()[:1] == [name])
        assert f"{100 * record['top1']:.2f} %" in line
        assert ("(trained)" in line) == (size == (8, 8))
        assert record["top1"] == pytest.approx(accuracy(weights, size), abs=1e-9)
    assert f"held-out accuracy {100 * records[8, 8]['top1']:.2f} %" in plain
    assert len({r["loss"] for r in records.values()}) == 4
    again = config.parse(ClsConfig, ["--config", str(folder / "config.yaml")], "x")
    assert again.sizes == "8,12,8x16,16x8" and again.eval_only
    status, out, err = cls(*evaluation, "--sizes=8,10x12")
    assert status == 2 and err.count("\n") == 1
    assert "sizes: 10x12" in err and "patch size 4x4" in err and "8x12 is" in err


def test_a_convolutional_network_takes_any_size(cls, tmp_path: Path):
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    status, out, err = cls(
        "--model.name=test_resnet", "--model.img_size=null", "--model.kwargs={}", "--eval-only",
        f"--checkpoint={tmp_path / 'weights.pth'}", "--sizes=32,32x48",
    )  # fmt: skip
    assert status == 0, err
    assert "32x48" in out


def test_sizes_are_read():
    assert parse_sizes("112, 0160,112x224") == [(112, 112), (160, 160), (112, 224)]
    for text in ("", "12x", "1.5", "-8", "8,,9", "0", "8x8x8", "0x8"):
        with pytest.raises(UserError, match="sizes: .*HEIGHTxWIDTH"):
            parse_sizes(text)


def test_sizes_are_for_evaluation(cls):
    status, _, err = cls("--sizes=8")
    assert (
        status == 2
        and err.count("\n") == 1
        and "sizes: '8' has no effect with eval_only: false" in err
    )
