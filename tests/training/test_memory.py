"""Images whose attention cannot fit into memory are refused before anything is allocated."""

import pytest
import torch
from timm.layers import set_fused_attn

from training.cls import model as module
from training.cls.model import build_model, check_memory
from training.cls.options import ClsConfig, ModelConfig
from training.errors import UserError
from training.options import RunConfig

RPE = "rpe-1.9-product-ctx-1-k"
TOKENS = 17  # 4 x 4 patches and a class token
LOGITS = 3 * 2 * TOKENS**2 * 4  # of three images and two heads, in float32


@pytest.fixture
def unfused():
    set_fused_attn(False)
    yield
    set_fused_attn(True)


def config(rpe=None, backend="auto", where="*", precision="fp32", name="vit_tiny_patch16_224"):
    kwargs = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = ModelConfig(name=name, img_size=16, kwargs=kwargs)
    options = {"rpe": rpe, "rpe_backend": backend, "rpe_where": where}
    return ClsConfig(model=model, run=RunConfig(precision=precision), **options)


def check(given, memory, monkeypatch, size=(16, 16)):
    monkeypatch.setattr(module, "device_memory", lambda device: memory)
    check_memory(given, build_model(given, 3), size, 3, torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "layer", "remedy"),
    [
        ({}, "blocks.0.attn", "timm's fused attention"),
        ({"rpe": RPE, "backend": "reference"}, "blocks.0.attn", "rpe_backend: auto"),
        ({"rpe": RPE, "where": "blocks.0.*"}, "blocks.1.attn", "timm's fused attention"),
    ],
)
def test_logits_that_are_materialised(options, layer, remedy, unfused, monkeypatch):
    check(config(**options), LOGITS, monkeypatch)
    with pytest.raises(UserError, match="images of 16x16 pixels are 17 tokens") as caught:
        check(config(**options), LOGITS - 1, monkeypatch)
    for part in (layer, remedy, "3 images x 2 heads x 17^2", "0.0 GiB"):
        assert part in str(caught.value)
    check(config(**options, precision="bf16"), LOGITS - 1, monkeypatch)
    with pytest.raises(UserError, match="16x32 pixels are 33 tokens"):
        check(config(**options), LOGITS, monkeypatch, (16, 32))


@pytest.mark.parametrize("options", [{}, {"rpe": RPE}, {"rpe": RPE, "backend": "eager"}])
def test_fused_attention_is_not_refused(options, monkeypatch):
    check(config(**options), 1, monkeypatch)


def test_an_encoding_with_its_own_backend_is_not_refused(unfused, monkeypatch):
    check(config(rpe=RPE, backend="eager"), 1, monkeypatch)


def test_the_script(cls, unfused, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "device_memory", lambda device: 2**10)
    status, _, err = cls()
    assert status == 2 and err.count("\n") == 1
    assert "images of 8x8 pixels are 5 tokens" in err
    assert not (tmp_path / "runs").exists()


def test_the_memory_of_the_host():
    assert 2**28 < module.device_memory(torch.device("cpu")) < 2**50
