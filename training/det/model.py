"""Build the detector of a configuration and its optimiser."""

from __future__ import annotations

import torch
from torch import nn

import irpe
from models.detr import DETR, build_detr
from training.det.options import DetConfig
from training.distributed import recompute
from training.errors import UserError
from training.seeding import derive
from training.weights import identity, start_from

# Options with the names of arguments of build_detr.
_SHARED = (
    "num_queries backbone dilation position_embedding hidden_dim nheads enc_layers dec_layers "
    "dim_feedforward dropout pre_norm aux_loss enc_rpe2d"
)


def build_model(config: DetConfig, categories: dict[int, str]) -> DETR:
    """Build the model, and load ``config.checkpoint`` into it.

    Args:
        config: options of the script.
        categories: names of the data's categories by id; ids are class numbers.
    """
    num_classes = max(categories) + 1
    given = config.data.num_classes
    if given is not None and given < num_classes:
        raise UserError(
            f"the data has class {num_classes - 1}, but the model has {given} classes "
            f"(0 to {given - 1}); set data.num_classes"
        )
    torch.manual_seed(derive(config.seed, "model"))
    model = build_detr(
        num_classes=given or num_classes,
        pretrained_backbone=config.pretrained_backbone and config.checkpoint is None,
        backend=config.rpe_backend,
        **{name: getattr(config, name) for name in _SHARED.split()},
    )
    if config.checkpoint is not None:
        heads, classes = (model.class_embed,), identity(categories)
        start_from(model, config.checkpoint, classes, heads, training=not config.eval_only)
    if config.grad_checkpointing:
        recompute([*model.transformer.encoder.layers, *model.transformer.decoder.layers])
    return model


def make_optimizer(config: DetConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Create AdamW with separate learning rates for backbone and tables."""
    encodings = [m for m in model.modules() if isinstance(m, irpe.Encoding)]
    tables = {id(p) for encoding in encodings for p in encoding.parameters()}
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        rate = config.lr
        if name.startswith("backbone."):
            rate = config.lr_backbone
            if rate == 0:
                parameter.requires_grad_(False)
        elif config.table_lr is not None and id(parameter) in tables:
            rate = config.table_lr
        if parameter.requires_grad:
            groups.setdefault(rate, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": group, "lr": rate} for rate, group in groups.items()],
        lr=config.lr,
        weight_decay=config.weight_decay,
    )
