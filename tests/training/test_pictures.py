"""The pictures say what the tables hold."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import irpe
from training.report import CLASSIFIER, draw_curves, draw_tables


def model_with(spec: str, **options) -> torch.nn.Module:
    shape = {"img_size": 64, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 4}
    model = timm.create_model("deit_tiny_patch16_224", **shape)
    irpe.attach(model, spec, **options)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lookup_table_" in name:
            torch.nn.init.normal_(parameter)
    return model


def colours(path: Path) -> int:
    with Image.open(path) as image:
        return len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0))


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    "spec",
    [
        "rpe-2.0-product-ctx-1-k",
        "rpe-1.9-product-ctx-0-qkv",
        "rpe-20-cross-ctx-1-k",
        "rpe-20-euc-bias-0-k",
        {"blocks.0.*": "rope-axial + rpe-1.9-product-bias-1-k", "*": "rpe-2.0-product-ctx-1-k"},
    ],
)
def test_every_method_is_drawn(spec: str, tmp_path: Path):
    model = model_with(spec)
    assert draw_tables(model, tmp_path / "tables.png")
    assert colours(tmp_path / "tables.png") > 100


def test_untrained_tables_are_drawn_and_no_tables_are_not(tmp_path: Path):
    model = model_with("rpe-2.0-product-ctx-1-k")
    for name, parameter in model.named_parameters():
        if "lookup_table_" in name:
            torch.nn.init.zeros_(parameter)
    assert draw_tables(model, tmp_path / "zero.png")
    irpe.detach(model)
    assert not draw_tables(model, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_curves_of_one_epoch_and_of_nothing_finite(tmp_path: Path):
    record = {"epoch": 1, "train_loss": 2.0, "loss": None, "train_top1": 0.1, "top1": 0.2}
    draw_curves([record], tmp_path / "curves.png", "one epoch", CLASSIFIER)
    assert colours(tmp_path / "curves.png") > 10
