"""The options of train_cls.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from training.options import (
    OPTIM_RULES,
    SCHEDULE_RULES,
    ImagesConfig,
    OptimConfig,
    Rule,
    ScriptConfig,
)


@dataclass(kw_only=True)
class ModelConfig:
    """The model: any name in timm's registry, also the published iRPE names."""

    name: str = "deit_small_patch16_224"
    """model name in timm's registry"""
    pretrained: bool = False
    """start from the published weights (downloads them)"""
    num_classes: int | None = None
    """number of classes; null: that of the data set"""
    img_size: int | None = None
    """side of the square input; null: the model's default"""
    in_chans: int = 3
    """1 for grey images, 3 for colour"""
    drop: float = 0.0
    """dropout before the classifier"""
    drop_path: float = 0.0
    """stochastic depth"""
    grad_checkpointing: bool = False
    """recompute activations in the backward pass to save memory"""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """further keyword arguments of the model, such as {depth: 6}"""


@dataclass(kw_only=True)
class DataConfig(ImagesConfig):
    """The images: digits, Fashion-MNIST, or a data set of timm.data.create_dataset."""

    name: str = "digits"
    """digits (embedded), fashion (Fashion-MNIST; splits train, validation, train+validation, test),
    folder (also a .tar file), torch/NAME, hfds/NAME, hfids/NAME, wds/NAME"""
    root: str | None = None
    """folder of the splits (train, validation or val), each with one folder per class or a .tar;
    for fashion, the folder of its IDX files; null: that of Debian's dataset-fashion-mnist"""
    train_split: str = "train"
    """split to train on"""
    val_split: str = "validation"
    """split to evaluate on"""
    class_map: str | None = None
    """text file with one class name per line; null: the folder names in natural order"""
    download: bool = False
    """download the data set into root, for fashion and timm data sets that support it"""
    interpolation: str | None = None
    """bilinear or bicubic; null: the model's default"""
    crop_pct: float | None = None
    """fraction of the resized image that evaluation crops; null: the model's default"""
    mean: list[float] | None = None
    """mean of each channel in [0, 1]; null: the model's default"""
    std: list[float] | None = None
    """standard deviation of each channel; null: the model's default"""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """further keyword arguments of timm.data.create_dataset"""


@dataclass(kw_only=True)
class AugConfig:
    """Augmentation of the training images. With enabled: false they are only resized."""

    enabled: bool = True
    """whether to augment"""
    scale: tuple[float, float] = (0.08, 1.0)
    """area of the random crop, as a fraction of the image"""
    ratio: tuple[float, float] = (0.75, 1.3333333333333333)
    """aspect ratio of the random crop"""
    hflip: float = 0.5
    """probability of a horizontal flip"""
    color_jitter: float = 0.3
    """strength of colour jitter; needs aa: null"""
    aa: str | None = None
    """timm policy, such as rand-m9-mstd0.5-inc1"""
    affine_degrees: float = 0.0
    """largest random rotation, in degrees"""
    affine_translate: float = 0.0
    """largest random shift, as a fraction of the side"""
    affine_scale: float = 0.0
    """largest random change of size: 0.1 gives 0.9 to 1.1"""
    reprob: float = 0.0
    """probability of random erasing"""
    remode: Literal["const", "rand", "pixel"] = "pixel"
    """content of erased regions"""
    recount: int = 1
    """number of regions to erase"""
    repeats: int = 1
    """copies of each image in the batch of all processes, augmented differently (repeated
    augmentation; DeiT: 3); an epoch then has that many times fewer different images"""
    mixup: float = 0.0
    """alpha of mixup; 0: none"""
    cutmix: float = 0.0
    """alpha of cutmix; 0: none"""
    mixup_prob: float = 1.0
    """probability that a batch is mixed"""
    mixup_switch_prob: float = 0.5
    """probability of cutmix if both are used"""
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    """one random mix for the batch, for each pair or for each image"""
    smoothing: float = 0.1
    """label smoothing"""


@dataclass(kw_only=True)
class ClsConfig(ScriptConfig):
    """Train or evaluate an image classifier, with or without relative position encoding."""

    rpe: str | None = None
    """relative position encoding to attach, such as rpe-2.0-product-ctx-1-k; null: none"""
    rpe_where: str = "*"
    """shell pattern for the names of the attention modules that get the encoding"""
    rpe_backend: str = "auto"
    """backend of attention with an encoding: auto, reference, sdpa or triton"""
    epochs: int = 300
    """passes over the training images"""
    batch_size: int = 1024
    """images per optimiser step, in all processes and accumulated batches"""
    eval_batch_size: int | None = None
    """images per forward pass of each process in evaluation; null: as in training"""
    sizes: str | None = None
    """with eval_only: sizes to evaluate at, as 112,160,224,112x224 (height x width)"""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    aug: AugConfig = field(default_factory=AugConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    rules = (
        Rule("data.root data.download data.train_split data.val_split", "data.name not digits",
             ": use folder, or another data set"),
        Rule("data.exif data.class_map data.kwargs", "data.name not digits or fashion",
             ": use folder, or another data set"),
        Rule("data.download data.kwargs", "data.name not folder or tar",
             ": use fashion, torch/NAME, hfds/NAME, tfds/NAME or wds/NAME"),
        Rule("data.download", "data.root not null", "",
             lambda c: c.data.root is not None or c.data.name != "fashion"),
        Rule("sizes", "eval_only: true", "; it does not train"),
        Rule("rpe_where rpe_backend", "rpe not null"),
        Rule("aug.color_jitter", "aug.aa: null"),
        Rule("aug.mixup_prob aug.mixup_mode", "aug.mixup or aug.cutmix above 0", "",
             lambda c: c.aug.mixup > 0 or c.aug.cutmix > 0),
        Rule("aug.mixup_switch_prob", "aug.mixup and aug.cutmix above 0", "",
             lambda c: c.aug.mixup > 0 and c.aug.cutmix > 0),
        Rule("aug.remode aug.recount", "aug.reprob above 0"),
        Rule("model.pretrained", "checkpoint: null", "; one replaces the published weights"),
        *SCHEDULE_RULES,
        *OPTIM_RULES,
    )  # fmt: skip
