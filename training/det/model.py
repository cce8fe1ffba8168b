"""Build the detector that a configuration describes, its loss and its optimiser."""

from __future__ import annotations

import torch
from torch import nn

from irpe.tools.weights import read_weights
from models.detr import DETR, Criterion, HungarianMatcher, build_detr
from training.det.options import DetConfig
from training.errors import UserError
from training.recompute import recompute
from training.seeding import derive
from training.weights import apply_weights


def build_model(config: DetConfig, num_classes: int) -> DETR:
    """Build the model, and load ``config.checkpoint`` into it.

    Args:
        num_classes: class numbers that the data needs.
    """
    given = config.data.num_classes
    if given is not None and given < num_classes:
        raise UserError(
            f"the data holds class {num_classes - 1}, but the model has {given} classes "
            f"(0 to {given - 1}); set data.num_classes"
        )
    torch.manual_seed(derive(config.seed, "model"))
    model = build_detr(
        num_classes=given or num_classes,
        num_queries=config.num_queries,
        backbone=config.backbone,
        dilation=config.dilation,
        pretrained_backbone=config.pretrained_backbone and config.checkpoint is None,
        position_embedding=config.position_embedding,
        hidden_dim=config.hidden_dim,
        nheads=config.nheads,
        enc_layers=config.enc_layers,
        dec_layers=config.dec_layers,
        dim_feedforward=config.dim_feedforward,
        dropout=config.dropout,
        pre_norm=config.pre_norm,
        aux_loss=config.aux_loss,
        enc_rpe2d=config.enc_rpe2d,
        backend=config.rpe_backend,
    )
    if config.checkpoint is not None:
        weights = read_weights(config.checkpoint)
        apply_weights(model, weights, config.checkpoint, "backbone, hidden_dim and enc_rpe2d")
    if config.grad_checkpointing:
        recompute([*model.transformer.encoder.layers, *model.transformer.decoder.layers])
    return model


def make_criterion(config: DetConfig, model: DETR) -> Criterion:
    matcher = HungarianMatcher(config.set_cost_class, config.set_cost_bbox, config.set_cost_giou)
    return Criterion(
        model.class_embed.out_features - 1,
        matcher,
        config.eos_coef,
        config.bbox_loss_coef,
        config.giou_loss_coef,
    )


def make_optimizer(config: DetConfig, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with the backbone's own learning rate; everything decays, as in the original."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    body = [p for name, p in named if name.startswith("backbone.")]
    rest = [p for name, p in named if not name.startswith("backbone.")]
    if config.lr_backbone == 0:
        for parameter in body:
            parameter.requires_grad_(False)
        body = []
    groups = [{"params": rest}, {"params": body, "lr": config.lr_backbone}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        weight_decay=config.weight_decay,
    )
