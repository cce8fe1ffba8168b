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


def test_warmup_longer_than_the_run_is_an_error():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(UserError, match=r"sched.warmup_epochs: 5 leaves nothing of epochs: 5"):
        make_schedule(optimizer, SchedConfig(), epochs=5, steps_per_epoch=2)


def test_moving_average(model):
    assert make_ema(model, EmaConfig()) is None
    ema = make_ema(model, EmaConfig(enabled=True, decay=0.75))
    before = model.head.bias.detach().clone()
    with torch.no_grad():
        model.head.bias += 4
    ema.update(model, step=2)
    torch.testing.assert_close(ema.module.head.bias.detach(), before + 1)
    with pytest.raises(UserError, match=r"ema\.decay"):
        make_ema(model, EmaConfig(enabled=True, decay=1.5))
