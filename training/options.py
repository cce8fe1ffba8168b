"""The options that all training scripts share."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import yaml


class Rule(NamedTuple):
    """Options that have an effect only if another option has certain values.

    Args:
        options: dotted names, separated by spaces.
        needs: the condition: an option's name, then ": ", " not " or " above " and a value or
            several, as in "sched.sched: step or poly".
        note: a further explanation, for the error.
        test: the condition as a function, if ``needs`` cannot express it.
    """

    options: str
    needs: str
    note: str = ""
    test: Callable[[Any], bool] | None = None

    @property
    def switch(self) -> str:
        """Name of the option in the condition."""
        return re.split(r"[: ]", self.needs)[0]

    def used(self, config: Any) -> bool:
        """Return whether the options have an effect in a config."""
        if self.test is not None:
            return self.test(config)
        value = operator.attrgetter(self.switch)(config)
        relation, wanted = re.fullmatch(r"[\w.]+(:| not| above) (.*)", self.needs).groups()
        values = [yaml.safe_load(text) for text in wanted.split(" or ")]
        return value > values[0] if relation == " above" else (value in values) == (relation == ":")


# Problem -> (test of a value, names of options). Scripts have only some of these options.
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "is not at least 1": (
        lambda x: x >= 1,
        "epochs batch_size grad_accum_steps eval_batch_size steps_per_epoch budget eval_tokens "
        "lr_drop aug.repeats model.dim model.depth model.num_heads questions.longest_question "
        "questions.longest_answer excerpts.size run.save_every run.eval_every run.save_steps "
        "run.keep run.threads",
    ),
    "is negative": (lambda x: x >= 0, "run.max_skipped data.workers memory sample temperature"),
    "is not in [0, 1)": (
        lambda x: 0 <= x < 1,
        "ema.decay model.drop model.attn_drop model.act_drop",
    ),
    "is not a probability": (lambda x: 0 <= x <= 1, "aug.hflip aug.crop_prob"),
}
SCHEDULE_RULES = (
    Rule("ema.decay ema.warmup", "ema.enabled: true"),
    Rule("sched.warmup_lr", "sched.warmup_epochs above 0"),
    Rule("sched.decay_milestones", "sched.sched: multistep"),
    Rule("sched.decay_rate", "sched.sched: step or multistep or poly"),
    Rule("run.shard", "run.precision: fp32 or bf16"),
    Rule("run.shard", "run.compile: false"),
    Rule("resume", "eval_only: false"),
    Rule("allow_changed_data", "resume not null", ": auto, or a run's folder"),
)
OPTIM_RULES = (
    Rule("optim.lr_base optim.lr_base_size", "optim.lr: null"),
    Rule("sched.decay_epochs", "sched.sched: step"),
)


@dataclass(kw_only=True)
class OptimConfig:
    """Optimiser, by its name in timm."""

    opt: str = "adamw"
    """name of a timm optimiser"""
    lr: float | None = None
    """learning rate; null: lr_base x batch_size / lr_base_size"""
    lr_base: float = 5e-4
    """learning rate for a batch of lr_base_size images"""
    lr_base_size: int = 512
    """batch size for lr_base"""
    weight_decay: float = 0.05
    """weight decay; not for vectors (biases, norms) and the model's no_weight_decay()"""
    table_decay: bool = True
    """whether relative position tables have weight decay, as in the released training code"""
    table_lr: float | None = None
    """learning rate of relative position tables; null: as for other weights"""
    betas: tuple[float, float] | None = None
    """Adam's betas; null: the optimiser's default"""
    eps: float | None = None
    """Adam's epsilon; null: the optimiser's default"""
    momentum: float = 0.9
    """momentum of optimisers that have one"""
    layer_decay: float | None = None
    """factor on the learning rate from each layer to the one below; null: none"""
    clip_grad: float | None = None
    """maximum norm of the gradient; null: no clipping"""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """further keyword arguments of the optimiser"""


@dataclass(kw_only=True)
class SchedConfig:
    """Learning rate schedule, by its name in timm; it is updated at every step."""

    sched: Literal["cosine", "tanh", "step", "multistep", "poly", "constant"] = "cosine"
    """shape of the schedule"""
    warmup_epochs: float = 5
    """epochs of linear warm-up from warmup_lr"""
    warmup_lr: float = 1e-6
    """learning rate of the first step"""
    min_lr: float = 1e-5
    """learning rate of the last step"""
    decay_epochs: float = 30
    """epochs between two decays (step)"""
    decay_milestones: list[int] = field(default_factory=lambda: [90, 180, 270])
    """epochs of the decays (multistep)"""
    decay_rate: float = 0.1
    """factor of a decay (step, multistep), power (poly)"""
    cooldown_epochs: int = 0
    """epochs at min_lr after the end, added to epochs"""


@dataclass(kw_only=True)
class EmaConfig:
    """Moving average of the weights, which is evaluated too."""

    enabled: bool = False
    """compute a moving average"""
    decay: float = 0.99996
    """decay of the average at each step"""
    warmup: bool = False
    """increase the decay from 0 over the first steps"""


@dataclass(kw_only=True)
class ImagesConfig:
    """Reading of images."""

    on_bad_image: Literal["skip", "fail"] = "skip"
    """for an image that is missing or does not decode: skip and report it, or stop"""
    exif: bool = False
    """apply the EXIF orientation of images, unlike timm's and COCO's readers; sizes and boxes of
    annotations must then be those of the rotated images"""
    workers: int | None = None
    """loader processes for each process of the job; 0: load in the main process; null: the
    available CPU cores of the host divided by its processes, at most 8; 0 for the digits; 4 for
    streams (wds, hfids, tfds), whose order depends on the number"""


@dataclass(kw_only=True)
class RunConfig:
    """Output, checkpoints, precision and devices of a run."""

    output: str = "runs"
    """folder of the run directories"""
    experiment: str | None = None
    """name of the run directory; null: model, encoding and seed"""
    save_every: int = 1
    """epochs between two checkpoints; the last epoch is always saved"""
    save_steps: int | None = None
    """steps between two additional checkpoints; null: none"""
    keep: int = 2
    """number of training states to keep, besides the best weights"""
    on_save_error: Literal["stop", "continue"] = "stop"
    """if a checkpoint cannot be written, as on a full disk: stop, or continue with the previous
    one; the checkpoint of the last epoch must be written"""
    max_skipped: int = 0
    """maximum number of steps to skip because their loss or gradient is not finite; if not 0, every
    step synchronises with the GPU"""
    eval_every: int = 1
    """epochs between two evaluations; the last epoch is always evaluated"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """number format of the forward pass (autocast); fp16 needs a GPU"""
    device: Literal["auto", "cpu"] = "auto"
    """cpu: do not use a GPU"""
    compile: bool = False
    """compile the model with torch.compile"""
    shard: bool = False
    """shard weights, gradients and optimiser state over the processes (FSDP2)"""
    threads: int | None = None
    """CPU threads of torch; null: torch's default"""
    trackers: list[str] = field(default_factory=list)
    """experiment trackers that get each epoch's record, as [tensorboard, wandb]; their files are in
    the run directory"""
    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    """a progress bar, a line per epoch, or nothing; auto: a bar on a terminal, lines elsewhere"""


@dataclass(kw_only=True)
class ScriptConfig:
    """The options that all scripts share."""

    grad_accum_steps: int = 1
    """number of forward passes of one step"""
    seed: int = 0
    """seed of all random numbers"""
    plugins: list[str] = field(default_factory=list)
    """modules to import first, which register your encodings, as [mine] for mine.py"""
    eval_only: bool = False
    """evaluate the checkpoint (or published weights) and stop"""
    checkpoint: str | None = None
    """weights to start from, or to evaluate: .pth or .safetensors"""
    resume: str | None = None
    """resume an interrupted run: its folder, or auto for the newest of this name"""
    allow_changed_data: bool = False
    """resume even if the data changed since the state was saved; the changes are printed"""
    sched: SchedConfig = field(default_factory=SchedConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    run: RunConfig = field(default_factory=RunConfig)
