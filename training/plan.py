"""What a task and the loop tell one another: the figures of a run, and of a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Step:
    """What a task computed for one batch.

    Attributes:
        loss: the mean over the batch. count: its samples. sums: further figures, summed over the
            samples: shares of them or, named ``loss_...``, parts of the loss.
        names: the samples, for whoever has to look for a bad one.
        units: what the pace counts; None: the samples.
    """

    loss: Tensor
    count: int
    sums: dict[str, Tensor] = field(default_factory=dict)
    names: list[Any] = field(default_factory=list)
    units: int | None = None


@dataclass(kw_only=True)
class Plan:
    """The figures of a run.

    Attributes:
        eval_every: epochs between two evaluations; the last epoch always has one.
        save_every: epochs between two checkpoints. save_steps: steps between two further ones.
        keep: newest states to keep. patient: go on if a checkpoint cannot be written.
        max_skipped: steps that may be left out because something is not finite.
        best: name of the evaluation figure that decides which checkpoint is the best; the highest
            one or, with ``lower``, the lowest.
        advice: what may help where the loss is not finite.
        about: what the header of a weights file says of them.
    """

    epochs: int
    steps_per_epoch: int
    accumulate: int = 1
    clip_grad: float | None = None
    save_every: int = 1
    save_steps: int | None = None
    keep: int = 2
    patient: bool = False
    max_skipped: int = 0
    seed: int = 0
    eval_every: int = 1
    best: str = "top1"
    lower: bool = False
    advice: str = ""
    about: dict[str, Any] = field(default_factory=dict)
