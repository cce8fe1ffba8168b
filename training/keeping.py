"""What a run keeps on the disk: weights for people, states to go on from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from training.checkpoints import States, save_weights
from training.errors import UserError
from training.runfolder import RunFolder
from training.sharding import Sharded


class Keeper:
    """Writes and restores all that a step depends on.

    Args:
        raw: the model as the task built it, with the weights of now where something is written.
        folder: of the main process, None in others. sharded: what trains in its place, if any.
        keep: states to keep. patient: whether a run goes on when something cannot be written.
        about: what the header of a weights file says of them. warn: prints a line for people.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        raw: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Scheduler,
        ema: ModelEmaV3 | None,
        folder: RunFolder | None,
        sharded: Sharded | None,
        *,
        keep: int,
        patient: bool,
        about: dict[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self.accelerator, self.raw, self.optimizer = accelerator, raw, optimizer
        self.schedule, self.ema, self.folder, self.sharded = schedule, ema, folder, sharded
        self.patient, self.about, self.warn = patient, about, warn
        self.states = None if folder is None else States(folder / "checkpoints", keep)
        self._saved: tuple[int, int] | None = None

    def save_state(self, position: dict[str, Any], *, must: bool = False) -> None:
        """Write a state, on the main process: ``position``, weights and what goes with them.

        Sharded, every process has its part of the optimiser's state to give.
        """
        optimizer = (
            self.optimizer.state_dict()
            if self.sharded is None
            else self.sharded.gathered(self.optimizer)
        )
        name = position["epoch"], position["step"]
        if self.states is None or name == self._saved:
            return
        scaler = self.accelerator.scaler
        state = {
            **position,
            "model": self.raw.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": optimizer,
            "schedule": self.schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        states = self.states
        if self._tried(lambda: states.save(state), must):
            self._saved = name

    def save_weights(self, record: dict[str, Any], best: bool, last: bool, *, must: bool) -> None:
        """Write the weights of an epoch, on the main process, as the best and as the last ones."""
        if self.folder is None:
            return
        folder, about = self.folder / "checkpoints", {**self.about, **record}
        averaged = self.raw if self.ema is None else self.ema.module
        files = {"best": averaged} if best else {}
        if last:
            files["last"] = self.raw
            if self.ema is not None:
                files["last-ema"] = averaged
        for name, model in files.items():
            path = folder / f"{name}.safetensors"
            self._tried(lambda path=path, model=model: save_weights(path, model, about), must)

    def log(self, record: dict[str, Any], *, must: bool) -> None:
        """Append an epoch's record to the metrics, on the main process."""
        folder = self.folder
        if folder is not None:
            self._tried(lambda: folder.log(record), must)

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`save_state` wrote, in every process."""
        self.raw.load_state_dict(state["model"])
        if self.sharded is None:
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            self.sharded.scatter()
            self.sharded.restore(self.optimizer, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _tried(self, write: Callable[[], Any], must: bool) -> bool:
        try:
            write()
        except UserError as error:
            if must or not self.patient:
                raise
            self.warn(f"{error}; the run goes on, with the checkpoint before")
            return False
        return True
