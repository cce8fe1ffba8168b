"""Optimiser, schedule and moving average, all of them timm's."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from training.errors import UserError
from training.options import EmaConfig, OptimConfig, SchedConfig

TABLE = "lookup_table_"


def learning_rate(config: OptimConfig, batch_size: int) -> float:
    """Return the learning rate for ``batch_size`` images a step: given, or by the linear rule."""
    if config.lr is not None:
        return config.lr
    return config.lr_base * batch_size / config.lr_base_size


def make_optimizer(model: nn.Module, config: OptimConfig, batch_size: int) -> torch.optim.Optimizer:
    """Create the optimiser. Vectors and the model's own exemptions do not decay.

    With ``table_decay: false`` the parameters whose names contain ``lookup_table_`` are exempt too.
    """
    if config.opt not in list_optimizers():
        raise UserError(
            f"optim.opt: timm has no optimiser {config.opt!r}; there are: "
            + ", ".join(list_optimizers())
        )
    options: dict[str, Any] = dict(config.kwargs)
    if config.betas is not None:
        options["betas"] = tuple(config.betas)
    if config.eps is not None:
        options["eps"] = config.eps
    # timm's way to exempt parameters is to ask the model, so the tables are added to its answer.
    listed = getattr(model, "no_weight_decay", set)
    exempt = set(listed())
    if not config.table_decay:
        exempt |= {name for name, _ in model.named_parameters() if TABLE in name}
    model.no_weight_decay = lambda: exempt  # type: ignore[assignment]
    try:
        return create_optimizer_v2(
            model,
            opt=config.opt,
            lr=learning_rate(config, batch_size),
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            layer_decay=config.layer_decay,
            **options,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"optim: {config.opt!r} cannot be created: {error}") from error
    finally:
        del model.no_weight_decay


def make_schedule(
    optimizer: torch.optim.Optimizer, config: SchedConfig, epochs: int, steps_per_epoch: int
) -> tuple[Scheduler, int]:
    """Create the schedule, advanced by ``step_update(step)``; return it and the epochs in all."""
    if config.warmup_epochs >= epochs and config.warmup_epochs > 0:
        raise UserError(
            f"sched.warmup_epochs: {config.warmup_epochs:g} leaves nothing of epochs: {epochs}"
        )
    return create_scheduler_v2(
        optimizer,
        sched=config.sched,
        num_epochs=epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=config.warmup_lr,
        min_lr=config.min_lr,
        decay_epochs=config.decay_epochs,
        decay_milestones=config.decay_milestones,
        decay_rate=config.decay_rate,
        cooldown_epochs=config.cooldown_epochs,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )


def make_ema(model: nn.Module, config: EmaConfig) -> ModelEmaV3 | None:
    """Create the moving average of the weights, if the config wants one."""
    if not config.enabled:
        return None
    if not 0 <= config.decay < 1:
        raise UserError(f"ema.decay: {config.decay} is not in [0, 1)")
    return ModelEmaV3(model, decay=config.decay, use_warmup=config.warmup)
