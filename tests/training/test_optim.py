"""Optimiser groups, learning rate, schedule and moving average."""

import pytest
import timm
import torch

import irpe
from training.errors import UserError
from training.optim import learning_rate, make_ema, make_optimizer, make_schedule
from training.options import EmaConfig, OptimConfig, SchedConfig


@pytest.fixture
def model() -> torch.nn.Module:
    options = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4}
    model = timm.create_model("deit_tiny_patch16_224", **options)
    irpe.attach(model, "rpe-2.0-product-ctx-1-k")
    return model


def decaying(model: torch.nn.Module, config: OptimConfig) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = make_optimizer(model, config, 512).param_groups
    assert sum(len(group["params"]) for group in groups) == len(names)
    return {
        names[id(parameter)]
        for group in groups
        if group["weight_decay"] > 0
        for parameter in group["params"]
    }


def test_tables_decay_unless_told_otherwise(model):
    tables = {name for name, _ in model.named_parameters() if "lookup_table_" in name}
    assert len(tables) == 2
    with_tables = decaying(model, OptimConfig())
    without = decaying(model, OptimConfig(table_decay=False))
    assert tables <= with_tables
    assert with_tables - without == tables
    for name in ("cls_token", "pos_embed", "blocks.0.norm1.weight", "head.bias"):
        assert name not in with_tables, name
    assert model.no_weight_decay() == type(model).no_weight_decay(model)


@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("layers", [None, 0.5])
def test_tables_have_a_learning_rate_of_their_own(model, decay, layers):
    config = OptimConfig(lr=0.1, table_lr=0.3, table_decay=decay, layer_decay=layers)
    optimizer = make_optimizer(model, config, 512)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    decays = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert rates.keys() == set(names.values())
    for name, rate in rates.items():
        if "lookup_table_" in name:
            assert rate == 0.3 and (decays[name] > 0) == decay
        else:
            assert rate == 0.1 or (layers and rate < 0.1), name
    plain = timm.create_model("deit_tiny_patch16_224", depth=1, embed_dim=16, num_heads=2)
    with pytest.raises(irpe.IrpeError, match="no encoding"):
        make_optimizer(plain, config, 512)


def test_learning_rate_follows_the_batch_unless_given():
    assert learning_rate(OptimConfig(lr_base=5e-4, lr_base_size=512), 1024) == 1e-3
    assert learning_rate(OptimConfig(lr=0.1), 1024) == 0.1


def test_unknown_optimiser_and_argument(model):
    with pytest.raises(UserError, match=r"no optimiser 'adamm'.*adamw"):
        make_optimizer(model, OptimConfig(opt="adamm"), 8)
    with pytest.raises(UserError, match="momentun"):
        make_optimizer(model, OptimConfig(kwargs={"momentun": 1}), 8)


def test_schedule_warms_up_and_falls_by_steps():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    config = SchedConfig(warmup_epochs=2, warmup_lr=0.1, min_lr=0.01)
    schedule, epochs = make_schedule(optimizer, config, epochs=10, steps_per_epoch=5)
    rates = []
    for step in range(51):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert epochs == 10
    assert rates[0] == pytest.approx(0.1)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[50] == pytest.approx(0.01)
    assert max(rates) > 0.9


def test_moving_average(model):
    assert make_ema(model, EmaConfig()) is None
    ema = make_ema(model, EmaConfig(enabled=True, decay=0.75))
    before = model.head.bias.detach().clone()
    with torch.no_grad():
        model.head.bias += 4
    ema.update(model, step=2)
    torch.testing.assert_close(ema.module.head.bias.detach(), before + 1)


@pytest.mark.parametrize(("backbone", "tables"), [(1e-5, None), (0.0, None), (1e-5, 1e-2)])
def test_learning_rates_of_a_detector(backbone, tables):
    from models.detr import build_detr
    from training.det import model as detector
    from training.det.options import DetConfig

    options = {"backbone": "stem", "num_classes": 3, "hidden_dim": 16, "nheads": 2}
    layers = {"enc_layers": 1, "dec_layers": 1, "dim_feedforward": 16}
    detr = build_detr(**options, **layers, enc_rpe2d="rpe-2.0-product-ctx-1-k")
    config = DetConfig(lr=1e-3, lr_backbone=backbone, table_lr=tables)
    optimizer = detector.make_optimizer(config, detr)
    names = {id(parameter): name for name, parameter in detr.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in detr.named_parameters():
        wanted = backbone if name.startswith("backbone.") else 1e-3
        wanted = tables if tables and "lookup_table_" in name else wanted
        assert rates.get(name, 0.0) == wanted and parameter.requires_grad == (wanted > 0), name
