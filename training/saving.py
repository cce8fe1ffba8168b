"""Write and restore weights and training states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from training.checkpoint import States, save_weights
from training.errors import UserError, one_line
from training.task import Context


class Checkpointer:
    """Writes and restores weights and training states."""

    def __init__(self, context: Context) -> None:
        self.context, options, folder = context, context.config.run, context.directory
        self.states = None if folder is None else States(folder / "checkpoints", options.keep)
        self.keep_training = options.on_save_error == "continue"
        self._saved: tuple[int, int] | None = None

    def save_state(self, position: dict[str, Any], *, must: bool = False) -> None:
        """Write ``position``, weights and optimiser state, on the main process.

        With sharding, every process must call this method.
        """
        run = self.context
        optimizer = (
            run.optimizer.state_dict() if run.sharded is None else run.sharded.full(run.optimizer)
        )
        name = position["epoch"], position["step"]
        if self.states is None or name == self._saved:
            return
        scaler = run.accelerator.scaler
        state = {
            **position,
            "model": run.model.state_dict(),
            "ema": None if run.ema is None else run.ema.state_dict(),
            "optimizer": optimizer,
            "schedule": run.schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        states = self.states
        if self.attempt(lambda: states.save(state), must):
            self._saved = name

    def save_weights(self, about: dict[str, Any], best: bool, last: bool, *, must: bool) -> None:
        """Write the best and the last weights, on the main process."""
        run = self.context
        if run.directory is None:
            return
        averaged = run.model if run.ema is None else run.ema.module
        files = {"best": averaged} if best else {}
        if last:
            files["last"] = run.model
            if run.ema is not None:
                files["last-ema"] = averaged
        header = {**run.task.about, **about}
        for name, model in files.items():
            path = run.directory / f"checkpoints/{name}.safetensors"
            self.attempt(lambda path=path, model=model: save_weights(path, model, header), must)

    def restore(self, state: dict[str, Any]) -> None:
        """Load a state of :meth:`save_state`, in every process."""
        run, scaler = self.context, self.context.accelerator.scaler
        try:
            run.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise UserError(
                f"resume: the run's state does not fit the model, which may have another "
                f"vocabulary or number of classes: {one_line(error).rpartition(': ')[2]}"
            ) from error
        if run.sharded is None:
            run.optimizer.load_state_dict(state["optimizer"])
        else:
            run.sharded.scatter()
            run.sharded.load_full(run.optimizer, state["optimizer"])
        run.schedule.load_state_dict(state["schedule"])
        if run.ema is not None:
            run.ema.load_state_dict(state["ema"])
        if scaler is not None:
            scaler.load_state_dict(state["scaler"])

    def attempt(self, write: Callable[[], Any], must: bool) -> bool:
        """Write a file; errors are raised, or warnings, depending on run.on_save_error."""
        try:
            write()
        except UserError as error:
            if must or not self.keep_training:
                raise
            self.context.progress.warn(f"{error}; training continues with the previous checkpoint")
            return False
        return True
