"""Activation checkpointing gives the gradients of plain training, dropout included."""

import copy

import pytest
import torch
from lm_command import TINY as LM_TINY

from training import config
from training.cls.model import build_model as build_classifier
from training.cls.options import ClsConfig
from training.det.model import build_model as build_detector
from training.det.options import DetConfig
from training.lm.model import build_language_model
from training.lm.options import LmConfig

RPE = "rpe-1.9-product-ctx-0-qkv"
K = "rpe-1.9-product-ctx-1-k"
ON = "grad_checkpointing=true"


def passes(model, *inputs):
    """Output and gradients, from the same random numbers."""
    for p in model.parameters():
        p.grad = None
    torch.manual_seed(5)
    out = model.train()(*inputs)
    out = out["pred_logits"] if isinstance(out, dict) else out
    out.square().mean().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out.detach(), grads


def assert_same(plain, again, inputs, tables):
    before = {name: p.detach().clone() for name, p in plain.state_dict().items()}
    assert before.keys() == again.state_dict().keys()
    for name, parameter in again.state_dict().items():
        parameter.copy_(before[name])
    out, wanted = passes(plain, *inputs)
    found_out, found = passes(again, *inputs)
    torch.testing.assert_close(found_out, out, rtol=0, atol=0)
    assert found.keys() == wanted.keys()
    assert [name for name in found if tables in name and found[name].abs().max() > 0]
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-9, msg=name)


def filled(model):
    """Tables that are not zero, so that each of them has a part in all gradients."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "table" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}),
        ("swin_tiny_patch4_window7_224", {"depths": (2, 2), "num_heads": (1, 2), "embed_dim": 8}),
        ("eva02_tiny_patch14_224", {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}),
    ],
)
def test_timm_models_with_attached_tables(name, options):
    arguments = [f"--model.name={name}", "--model.img_size=32", "--model.drop=0.3", f"--rpe={RPE}"]
    arguments.append(f"--model.kwargs={options}".replace("(", "[").replace(")", "]"))
    made = [
        build_classifier(config.parse(ClsConfig, [*arguments, *more], "train_cls.py"), 5)
        for more in ([], [f"--model.{ON}"])
    ]
    runs, modules = [], dict(made[1].named_modules())
    first = next(name for name in modules if name.endswith("norm1"))
    modules[first].register_forward_hook(lambda *given: runs.append(1))
    assert_same(filled(made[0]), made[1], (torch.randn(2, 3, 32, 32),), "lookup_table")
    assert len(runs) == 2


def test_detr():
    arguments = [
        *("--backbone=stem", "--pretrained_backbone=false", "--hidden_dim=16", "--nheads=2"),
        *("--enc_layers=2", "--dec_layers=2", "--dim_feedforward=16", "--num_queries=4"),
        f"--enc_rpe2d={K}",
    ]
    made = [
        build_detector(config.parse(DetConfig, [*arguments, *more], "train_det.py"), {4: "four"})
        for more in ([], [f"--{ON}"])
    ]
    padding = torch.zeros(2, 48, 40, dtype=torch.bool)
    padding[1, :, 24:] = True
    images = torch.randn(2, 3, 48, 40), padding
    assert_same(filled(made[0]), made[1], images, "lookup_table")
    runs = []
    made[1].transformer.encoder.layers[0].linear1.register_forward_hook(lambda *g: runs.append(1))
    made[1](*images)["pred_logits"].sum().backward()
    assert len(runs) == 2
    with torch.no_grad():
        made[1](*images)
    assert len(runs) == 3


@pytest.mark.parametrize("encoding", ["shaw,clip=4,on=kv", "t5", "rope"])
def test_language_models(encoding):
    arguments = [*LM_TINY, "--model.drop=0.2", "--model.attn_drop=0.2", f"--encoding={encoding}"]
    made = [
        build_language_model(config.parse(LmConfig, [*arguments, *more], "train_lm.py"), 50)
        for more in ([], [f"--model.{ON}"])
    ]
    tables = "embedding" if encoding == "rope" else "table"
    assert_same(filled(made[0]), made[1], (torch.randint(0, 50, (2, 9)),), tables)
    copy.deepcopy(made[1])(torch.randint(0, 50, (2, 9)))  # as a moving average makes one
