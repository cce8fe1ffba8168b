"""timm's optimisers, schedules and moving average."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

import irpe
from training.errors import UserError
from training.options import EmaConfig, OptimConfig, SchedConfig


def learning_rate(config: OptimConfig, batch_size: int) -> float:
    """Return ``lr`` of the config, or the linear rule's learning rate for ``batch_size``."""
    if config.lr is not None:
        return config.lr
    return config.lr_base * batch_size / config.lr_base_size


def make_optimizer(model: nn.Module, config: OptimConfig, batch_size: int) -> torch.optim.Optimizer:
    """Create the optimiser. Vectors and ``no_weight_decay()`` of the model have no weight decay.

    With ``table_decay: false``, parameters whose names contain ``lookup_table_`` have none either.
    With ``table_lr``, the tables of all encodings have separate groups (``irpe.param_groups``).
    """
    if config.opt not in list_optimizers():
        raise UserError(
            f"optim.opt: timm has no optimiser {config.opt!r}; there are: "
            + ", ".join(list_optimizers())
        )
    rate = learning_rate(config, batch_size)
    given = {"betas": config.betas and tuple(config.betas), "eps": config.eps, "lr": rate}
    options: dict[str, Any] = config.kwargs | {k: v for k, v in given.items() if v is not None}
    if config.table_lr is not None:
        groups = irpe.param_groups(
            model,
            lr=rate,
            weight_decay=config.weight_decay,
            table_lr=config.table_lr,
            table_weight_decay=None if config.table_decay else 0.0,
            layer_decay=config.layer_decay,
        )
        return _create(groups, config, options)
    # timm reads the names without weight decay from the model.
    listed = getattr(model, "no_weight_decay", set)
    exempt = set(listed())
    if not config.table_decay:
        exempt |= {name for name, _ in model.named_parameters() if "lookup_table_" in name}
    model.no_weight_decay = lambda: exempt
    options |= {"weight_decay": config.weight_decay, "layer_decay": config.layer_decay}
    try:
        return _create(model, config, options)
    finally:
        del model.no_weight_decay


def _create(parameters: Any, config: OptimConfig, options: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        return create_optimizer_v2(parameters, opt=config.opt, momentum=config.momentum, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"optim: {config.opt!r} cannot be created: {error}") from error


def make_schedule(
    optimizer: torch.optim.Optimizer, config: SchedConfig, epochs: int, steps_per_epoch: int
) -> tuple[Scheduler, int]:
    """Return a schedule, for ``step_update(step)``, and the number of epochs with cooldown."""
    return create_scheduler_v2(
        optimizer,
        num_epochs=epochs,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
        **dataclasses.asdict(config),  # whose names are timm's
    )


def make_ema(model: nn.Module, config: EmaConfig) -> ModelEmaV3 | None:
    """Create the moving average of the weights, or None if it is not enabled."""
    if not config.enabled:
        return None
    return ModelEmaV3(model, decay=config.decay, use_warmup=config.warmup)
