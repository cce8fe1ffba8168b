"""Parameters and multiply-adds of the published models, to the last digit."""

import pytest
import timm
import torch

import irpe
import irpe.zoo
from irpe.tools.complexity import activations, multiply_adds, parameters

PRODUCT = "_patch16_224_ctx_product_50_shared_"
# size, plain M; encodings with the M that their operations add: B H L D N a table
CASES = [
    ("tiny", 1258.4, {"k": 22.7}),
    ("small", 4608.3, {"k": 45.4, "qk": 90.8, "qkv": 136.2}),
    ("base", 17582.7, {"k": 90.8, "qkv": 272.3}),
]


@pytest.mark.cases(1)
@pytest.mark.parametrize(("size", "plain", "added"), CASES, ids=lambda x: str(x)[:5])
def test_multiply_adds(size, plain, added):
    image = torch.randn(1, 3, 224, 224)
    base = multiply_adds(timm.create_model(f"deit_{size}_patch16_224"), image)
    assert round(base / 1e6, 1) == plain
    for on, more in added.items():
        model = timm.create_model(f"deit_{size}{PRODUCT}{on}")
        assert round((multiply_adds(model, image) - base) / 1e6, 1) == more


def test_parameters():
    expected = {
        "deit_tiny" + PRODUCT + "k": 5_755_816,
        "deit_small" + PRODUCT + "k": 22_089_064,
        "deit_small" + PRODUCT + "qk": 22_127_464,
        "deit_small" + PRODUCT + "qkv": 22_165_864,
        "deit_base" + PRODUCT + "k": 86_606_056,
        "deit_base" + PRODUCT + "qkv": 86_682_856,
    }
    for name, count in expected.items():
        assert parameters(timm.create_model(name)) == count


def test_counting_leaves_the_model_alone():
    model = timm.create_model("deit_tiny_patch16_224", depth=1).train()
    multiply_adds(model, torch.randn(1, 3, 224, 224))
    assert model.training


def test_activations():
    """By hand: one layer of 197 tokens, 3 heads, 192 channels; a table adds 50 numbers a query."""
    image = torch.randn(1, 3, 224, 224)
    model = timm.create_model("deit_tiny_patch16_224", depth=1)
    patches, logits = 196 * 192, 3 * 197 * 197
    linear = 197 * (3 * 192 + 192 + 192 + 4 * 192 + 192)  # qkv, attention, its projection, MLP
    assert activations(model, image) == patches + linear + logits + 1000
    irpe.attach(model, "rpe-1.9-product-ctx-1-k")
    assert activations(model, image) == patches + linear + logits + 1000 + 3 * 197 * 50
