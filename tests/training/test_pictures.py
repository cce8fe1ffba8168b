"""The pictures say what the tables hold."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import irpe
from training.curves import CLASSIFIER, draw_curves
from training.pictures import draw_tables, table_norms


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


def test_norms_are_over_features_and_averaged_over_heads():
    model = model_with("rpe-2.0-product-ctx-0-kv")
    norms = table_norms(model)
    assert sorted(norms) == ["rpe_k", "rpe_v"]
    assert norms["rpe_k"].layers == [1, 2, 3]
    k = model.blocks[1].attn.rpe_k.lookup_table_weight.detach()  # [H, D, N]
    v = model.blocks[1].attn.rpe_v.lookup_table_weight.detach()  # [H, N, D]
    torch.testing.assert_close(norms["rpe_k"].values[1], k.square().sum(1).sqrt().mean(0))
    torch.testing.assert_close(norms["rpe_v"].values[1], v.square().sum(2).sqrt().mean(0))


def test_norms_of_bias_tables_and_of_some_layers():
    model = model_with("rpe-2.0-product-bias-0-k", where="blocks.[12].*")
    norm = table_norms(model)["rpe_k"]
    bias = model.blocks[1].attn.rpe_k.lookup_table_bias.detach()  # [H, N]
    assert norm.layers == [2, 3]
    torch.testing.assert_close(norm.values[0], bias.abs().mean(0))


@pytest.mark.parametrize(
    ("spec", "kinds"),
    [
        ("rpe-2.0-product-ctx-1-k", 1),
        ("rpe-1.9-product-ctx-0-qkv", 3),
        ("rpe-20-cross-ctx-1-k", 2),
        ("rpe-20-euc-bias-0-k", 1),
    ],
)
def test_every_method_is_drawn(spec: str, kinds: int, tmp_path: Path):
    model = model_with(spec)
    assert len(table_norms(model)) == kinds
    assert draw_tables(model, tmp_path / "tables.png", spec)
    assert colours(tmp_path / "tables.png") > 100


def test_untrained_tables_are_drawn_and_no_tables_are_not(tmp_path: Path):
    model = model_with("rpe-2.0-product-ctx-1-k")
    for name, parameter in model.named_parameters():
        if "lookup_table_" in name:
            torch.nn.init.zeros_(parameter)
    assert draw_tables(model, tmp_path / "zero.png", "rpe-2.0-product-ctx-1-k")
    irpe.detach(model)
    assert not draw_tables(model, tmp_path / "none.png", None)
    assert not (tmp_path / "none.png").exists()


def test_curves_of_one_epoch_and_of_nothing_finite(tmp_path: Path):
    record = {"epoch": 1, "train_loss": 2.0, "loss": None, "train_top1": 0.1, "top1": 0.2}
    draw_curves([record], tmp_path / "curves.png", "one epoch", CLASSIFIER)
    assert colours(tmp_path / "curves.png") > 10
