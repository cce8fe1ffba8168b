"""Every shipped detection config parses and builds; the recipes are the published ones."""

from pathlib import Path

import pytest
import torch
from cls_command import ROOT

from training import config
from training.det.model import build_model, make_optimizer
from training.det.options import DetConfig

CONFIGS = sorted((ROOT / "configs" / "det").glob("*.yaml"))
PUBLISHED = {  # AP on COCO's val2017, from the paper
    "detr_r50_150": 39.5,
    "detr_r50_300": 40.6,
    "detr_r50_k_150": 40.8,
    "detr_r50_k_300": 42.3,
}


def load(path: Path) -> DetConfig:
    return config.parse(DetConfig, ["--config", str(path)], "train_det.py")


def test_all_are_here():
    assert {path.stem for path in CONFIGS} == {"digits", *PUBLISHED}


@pytest.mark.parametrize(("name", "figure"), PUBLISHED.items())
def test_published_recipe(name: str, figure: float):
    path = ROOT / "configs" / "det" / f"{name}.yaml"
    text = " ".join(path.read_text().replace("#", " ").split())
    assert f"expected: {figure} AP" in text
    assert "not measured by us" in text
    got = load(path)
    epochs, drop = (300, 200) if name.endswith("300") else (150, 100)
    assert (got.epochs, got.lr_drop, got.batch_size) == (epochs, drop, 16)
    assert (got.lr, got.lr_backbone, got.weight_decay, got.clip_max_norm) == (1e-4, 1e-5, 1e-4, 0.1)
    assert (got.sched.sched, got.sched.warmup_epochs, got.sched.decay_rate) == ("step", 0, 0.1)
    aug = got.aug
    assert (tuple(aug.scales), aug.max_size, aug.eval_size) == (
        tuple(range(480, 801, 32)),
        1333,
        800,
    )
    assert (aug.crop_prob, aug.crop_scales, aug.crop_size) == (0.5, [400, 500, 600], (384, 600))
    # The parameters of the released model, and the learning rates that they get.
    got.pretrained_backbone = False
    with torch.device("meta"):
        model = build_model(got, {90: "toothbrush"})
    tables = 6 * 32 * 81 if "_k_" in name else 0
    assert sum(p.numel() for p in model.parameters()) == 41_524_768 + tables
    rest, body = make_optimizer(got, model).param_groups
    assert (rest["lr"], body["lr"]) == (1e-4, 1e-5)
    trained = sum(p.numel() for group in (rest, body) for p in group["params"])
    assert trained == 41_302_368 + tables  # without the backbone's first stages
