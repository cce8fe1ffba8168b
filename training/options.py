"""The options that every training script has; each script adds its own to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(kw_only=True)
class OptimConfig:
    """Optimiser, by its name in timm."""

    opt: str = "adamw"
    """name of a timm optimiser"""
    lr: float | None = None
    """learning rate; null: lr_base x batch_size / lr_base_size"""
    lr_base: float = 5e-4
    """learning rate at a batch of lr_base_size images"""
    lr_base_size: int = 512
    """batch that lr_base is meant for"""
    weight_decay: float = 0.05
    """weight decay; vectors (biases, norms) and what the model lists are exempt"""
    table_decay: bool = True
    """whether relative position tables decay too, as in the released training code"""
    betas: tuple[float, float] | None = None
    """Adam's two betas; null: the optimiser's own"""
    eps: float | None = None
    """Adam's epsilon; null: the optimiser's own"""
    momentum: float = 0.9
    """momentum of optimisers that have one"""
    layer_decay: float | None = None
    """factor on the learning rate from each layer to the one below; null: none"""
    clip_grad: float | None = None
    """largest norm of the gradient; null: no clipping"""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """further keyword arguments of the optimiser"""


@dataclass(kw_only=True)
class SchedConfig:
    """Schedule of the learning rate, by its name in timm; it advances every step."""

    sched: Literal["cosine", "tanh", "step", "multistep", "poly", "constant"] = "cosine"
    """shape of the schedule"""
    warmup_epochs: float = 5
    """epochs of linear growth from warmup_lr"""
    warmup_lr: float = 1e-6
    """learning rate of the first step"""
    min_lr: float = 1e-5
    """learning rate of the last step"""
    decay_epochs: float = 30
    """epochs between two falls (step)"""
    decay_milestones: list[int] = field(default_factory=lambda: [90, 180, 270])
    """epochs of the falls (multistep)"""
    decay_rate: float = 0.1
    """factor of a fall (step, multistep), power (poly)"""
    cooldown_epochs: int = 0
    """epochs at min_lr after the end, added to epochs"""


@dataclass(kw_only=True)
class EmaConfig:
    """Moving average of the weights, evaluated beside them."""

    enabled: bool = False
    """keep a moving average"""
    decay: float = 0.99996
    """share of the old average kept at each step"""
    warmup: bool = False
    """let the decay grow from 0 over the first steps"""


@dataclass(kw_only=True)
class RunConfig:
    """Where a run writes, and on what it computes."""

    output: str = "runs"
    """folder that holds the run folders"""
    experiment: str | None = None
    """name of the run folder; null: made from the model, the encoding and the seed"""
    save_every: int = 1
    """epochs between two checkpoints; the last epoch is always saved"""
    save_steps: int | None = None
    """steps between two further checkpoints, within epochs too; null: none"""
    keep: int = 2
    """newest training states to keep, beside the best weights"""
    on_save_error: Literal["stop", "continue"] = "stop"
    """a checkpoint that cannot be written, as on a full disk: stop, or go on with the one before;
    the last epoch's must be written"""
    max_skipped: int = 0
    """steps that may be left out because their loss or gradient is not finite; 0: stop at the
    first; more: a GPU is waited for at every step"""
    eval_every: int = 1
    """epochs between two evaluations; the last epoch is always evaluated"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """number format of the forward pass (autocast); fp16 needs a GPU"""
    device: Literal["auto", "cpu"] = "auto"
    """cpu: leave a GPU unused"""
    compile: bool = False
    """compile the model with torch.compile"""
    shard: bool = False
    """shard weights, gradients and optimiser state over the processes (FSDP2)"""
    threads: int | None = None
    """CPU threads of torch; null: as many as torch chooses"""
    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    """a progress bar, a line per epoch, or nothing; auto: a bar on a terminal, lines elsewhere"""
