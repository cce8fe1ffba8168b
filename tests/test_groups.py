"""param_groups: the same groups as timm's own functions, plus the tables."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

import irpe

K = "rpe-1.9-product-ctx-1-k"
SMALL = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
MODELS = {
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", **SMALL),
    "eva": lambda: timm.create_model("eva02_tiny_patch14_224", **SMALL),
    "swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1), num_heads=(1, 2), embed_dim=16
    ),
}


class Wrapped(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.neck = backbone, nn.Linear(3, 4)


def settings(groups, model):
    """Weight decay and learning rate of each parameter by its name, as the optimiser sees them."""
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    found = {}
    for group in groups:
        for p in group["params"]:
            rate = group.get("lr", 1e-3) * group.get("lr_scale", 1.0)
            assert found.setdefault(names[id(p)], (group["weight_decay"], rate)), "in two groups"
    assert set(found) == set(names.values())
    return found


@pytest.mark.parametrize("layer_decay", [None, 0.5])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_groups_are_timms(name, wrapped, layer_decay):
    model = MODELS[name]()
    given = {"weight_decay": 0.05, "no_weight_decay_list": model.no_weight_decay()}
    if layer_decay is None:
        theirs = param_groups_weight_decay(model, **given)
    else:
        theirs = param_groups_layer_decay(model, **given, layer_decay=layer_decay)
    wanted = settings(theirs, model)
    irpe.attach(model, K)
    whole, prefix = (Wrapped(model), "backbone.") if wrapped else (model, "")
    groups = irpe.param_groups(
        whole, lr=1e-3, weight_decay=0.05, table_lr=0.1, table_weight_decay=0.02,
        layer_decay=layer_decay,
    )  # fmt: skip
    found = settings(groups, whole)
    for key, value in wanted.items():
        assert found.pop(f"{prefix}{key}") == pytest.approx(value, rel=1e-12), key
    if wrapped:
        assert found.pop("neck.weight") == (0.05, 1e-3) and found.pop("neck.bias") == (0.0, 1e-3)
    assert len(found) == 2 and set(found.values()) == {(0.02, 0.1)}
    assert len({group["name"] for group in groups}) == len(groups)
    torch.optim.AdamW(groups)


def test_tables_without_a_rate_of_their_own_follow_their_layer():
    model = MODELS["vit"]()
    irpe.attach(model, K)
    model.cls_token.requires_grad_(False)  # in no group
    found = settings(irpe.param_groups(model, lr=1.0, weight_decay=0.1, layer_decay=0.5), model)
    for block in (0, 1):
        of_layer = found[f"blocks.{block}.attn.qkv.weight"]
        assert found[f"blocks.{block}.attn.rpe_k.lookup_table_weight"] == of_layer


def test_tables_that_the_model_exempts():
    import irpe.zoo

    name = "deit_tiny_patch16_224_ctx_product_50_shared_k"
    for decays, wanted in ((True, 0.1), (False, 0.0)):
        model = timm.create_model(name, **SMALL, table_decay=decays)
        found = settings(irpe.param_groups(model, weight_decay=0.1), model)
        assert found["blocks.0.attn.rpe_k.lookup_table_weight"][0] == wanted


def test_frequencies_never_decay():
    model = MODELS["vit"]()
    irpe.attach(model, "rope-mixed")
    groups = irpe.param_groups(model, weight_decay=0.1, table_weight_decay=0.1, table_lr=0.2)
    (group,) = (g for g in groups if g["name"] == "frequencies")
    assert group["weight_decay"] == 0.0 and group["lr"] == 0.2 and len(group["params"]) == 2


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (MODELS["vit"], {"layer_decay": 0.5}, "layer_decay=0.5 needs lr="),
        (lambda: nn.MultiheadAttention(8, 2), {"lr": 1.0, "layer_decay": 0.5}, "group_matcher"),
    ],
)
def test_layer_decay_that_cannot_be(make, options, says):
    model = make()
    with pytest.raises(irpe.IrpeError, match="no encoding"):
        irpe.param_groups(model)
    irpe.attach(model, K)
    with pytest.raises(irpe.IrpeError, match=says):
        irpe.param_groups(model, **options)


def test_layer_decay_of_compiled_models():
    model = MODELS["vit"]()
    irpe.attach(model, K)
    compiled = torch.compile(model, backend="eager")
    rates = [
        {id(p): group["lr"] for group in groups for p in group["params"]}
        for groups in (irpe.param_groups(x, lr=1.0, layer_decay=0.5) for x in (model, compiled))
    ]
    assert rates[0] == rates[1] and len(set(rates[0].values())) > 2


@pytest.mark.parametrize(
    "name", ["weight_decay", "lr", "table_weight_decay", "table_lr", "layer_decay"]
)
def test_values_that_are_no_numbers(name):
    model = MODELS["vit"]()
    irpe.attach(model, K)
    with pytest.raises(irpe.IrpeError, match=f"{name}='1e-3' is not a number"):
        irpe.param_groups(model, **{"lr": 1e-3, name: "1e-3"})
