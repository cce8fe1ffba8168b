"""The options of train_det.py, with DETR's names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from training.options import SCHEDULE_RULES, ImagesConfig, Rule, SchedConfig, ScriptConfig


@dataclass(kw_only=True)
class DetDataConfig(ImagesConfig):
    """The images: COCO's files, or the embedded scenes of handwritten digits."""

    name: Literal["digits", "coco"] = "digits"
    """digits (embedded; created at first use) or coco"""
    root: str | None = None
    """folder of the digits; null: data/digits-detection"""
    train_images: str | None = None
    """folder or .zip of training images; null: train2017 or train2017.zip under coco_path"""
    train_annotations: str | None = None
    """instances JSON of the training images; null: annotations/instances_train2017.json"""
    val_images: str | None = None
    """folder or .zip of held-out images; null: val2017 or val2017.zip under coco_path"""
    val_annotations: str | None = None
    """instances JSON of the held-out images; null: annotations/instances_val2017.json"""
    num_classes: int | None = None
    """number of classes of the model; null: the largest category id plus 1 (COCO: 91)"""
    on_bad_annotation: Literal["skip", "fail"] = "skip"
    """for an invalid annotation: skip and report it, or stop"""


@dataclass(kw_only=True)
class DetAugConfig:
    """Sizes of the images, and augmentation of the training images."""

    enabled: bool = True
    """whether to augment; false: training images are processed like held-out ones"""
    hflip: float = 0.5
    """probability of a horizontal flip"""
    scales: list[int] = field(default_factory=lambda: list(range(480, 801, 32)))
    """sizes of the shorter side, in pixels; one is drawn for each image"""
    max_size: int = 1333
    """largest length of the longer side, in pixels"""
    crop_prob: float = 0.5
    """probability of a random crop before the resize"""
    crop_scales: list[int] = field(default_factory=lambda: [400, 500, 600])
    """sizes of the shorter side before a crop, in pixels"""
    crop_size: tuple[int, int] = (384, 600)
    """smallest and largest side of a crop, in pixels"""
    eval_size: int = 800
    """size of the shorter side of held-out images, in pixels"""
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """mean of each channel in [0, 1]; ImageNet's, as for the backbones"""
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """standard deviation of each channel"""


@dataclass(kw_only=True)
class DetConfig(ScriptConfig):
    """Train or evaluate DETR, with or without relative position encoding in its encoder."""

    enc_rpe2d: str | list[str | None] | None = None
    """encoding of the encoder's self-attention, such as rpe-2.0-product-ctx-1-k; a list gives one
    for each layer; null: none"""
    rpe_backend: str = "auto"
    """backend of the attention with an encoding: auto, reference, eager, sdpa or triton"""
    coco_path: str | None = None
    """folder with train2017, val2017 (folders or .zip) and annotations"""
    lr: float = 1e-4
    """learning rate of the transformer"""
    table_lr: float | None = None
    """learning rate of relative position tables; null: lr"""
    lr_backbone: float = 1e-5
    """learning rate of the backbone; 0: frozen"""
    batch_size: int = 16
    """images per optimiser step, in all processes and accumulated batches"""
    weight_decay: float = 1e-4
    """weight decay, of all parameters"""
    epochs: int = 300
    """passes over the training images"""
    lr_drop: int = 200
    """epoch after which the learning rate is divided by 10"""
    clip_max_norm: float = 0.1
    """maximum norm of the gradient; 0: no clipping"""
    backbone: str = "resnet50"
    """a timm feature extractor, or stem: three convolutions, stride 8"""
    pretrained_backbone: bool = True
    """start the backbone from published weights (downloads them)"""
    dilation: bool = False
    """twice the resolution in the backbone's last stage (DC5)"""
    position_embedding: Literal["sine", "learned"] = "sine"
    """absolute positions of the feature map"""
    enc_layers: int = 6
    """layers of the encoder"""
    dec_layers: int = 6
    """layers of the decoder"""
    dim_feedforward: int = 2048
    """width of the feed-forward layers"""
    hidden_dim: int = 256
    """width of the transformer"""
    dropout: float = 0.1
    """dropout in the transformer"""
    nheads: int = 8
    """attention heads"""
    num_queries: int = 100
    """maximum number of objects in an image"""
    pre_norm: bool = False
    """whether norms are before attention and feed-forward"""
    grad_checkpointing: bool = False
    """recompute activations of encoder and decoder in the backward pass to save memory"""
    aux_loss: bool = True
    """whether every decoder layer has a loss"""
    set_cost_class: float = 1.0
    """weight of the class in matching"""
    set_cost_bbox: float = 5.0
    """weight of the boxes' L1 distance in matching"""
    set_cost_giou: float = 2.0
    """weight of the boxes' generalized IoU in matching"""
    bbox_loss_coef: float = 5.0
    """weight of the L1 loss of boxes"""
    giou_loss_coef: float = 2.0
    """weight of the generalized IoU loss"""
    eos_coef: float = 0.1
    """weight of "no object" in the class loss"""
    eval_batch_size: int | None = None
    """images per forward pass of each process in evaluation; null: as in training"""
    pictures: int = 8
    """number of held-out images to draw with their detections at the end of a run"""
    data: DetDataConfig = field(default_factory=DetDataConfig)
    aug: DetAugConfig = field(default_factory=DetAugConfig)
    sched: SchedConfig = field(
        default_factory=lambda: SchedConfig(sched="step", warmup_epochs=0, min_lr=0.0)
    )

    rules = (
        Rule("coco_path data.train_images data.train_annotations data.val_images "
             "data.val_annotations data.exif", "data.name: coco"),
        Rule("data.root", "data.name: digits", "; COCO's folder is coco_path"),
        Rule("coco_path", "data.train_images: null", ", or another path of data to be null",
             lambda c: not (c.data.train_images and c.data.train_annotations
                            and c.data.val_images and c.data.val_annotations)),
        Rule("rpe_backend table_lr", "enc_rpe2d not null"),
        Rule("aug.crop_scales aug.crop_size", "aug.crop_prob above 0"),
        Rule("lr_drop", "sched.sched: step"),
        Rule("sched.decay_epochs", "lr_drop to be the same number", ": DETR's name for it",
             lambda c: c.sched.decay_epochs == c.lr_drop),
        *SCHEDULE_RULES,
    )  # fmt: skip
