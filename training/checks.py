"""Checks for losses and gradients that are not finite."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training.checkpoint import save_tensors
from training.errors import UserError
from training.task import Context


class FiniteCheck:
    """Decides for each step whether its gradient is applied.

    Up to ``run.max_skipped`` steps with a loss or gradient that is not finite are skipped; the next
    one ends the run. On a GPU without skipping, the numbers stay on the device and :meth:`check`
    reads them every few steps: the run ends a few steps late, but before anything is saved.
    """

    def __init__(self, context: Context) -> None:
        self.context, self.limit = context, context.config.run.max_skipped
        self.skipped = 0
        # Reading a number synchronises with the GPU.
        self.every_step = self.limit > 0 or context.accelerator.device.type == "cpu"
        self._clear()

    def add(self, step: int, loss: Tensor, names: list[Any], batch: Any) -> None:
        """Record a batch and its loss."""
        self._loss = self._loss + loss.detach().double()
        self._recent.append({"step": step, "names": names})
        if self.every_step:
            self._batches.append(batch)

    def add_norm(self, norm: Tensor) -> None:
        """Record the norm of a step's gradient."""
        # fp16 gradients may overflow; the scaler then skips the step and reduces the scale.
        scaler = self.context.accelerator.scaler
        if scaler is None or scaler.get_scale() < 1:
            self._norm = self._norm + norm.detach().double()

    @property
    def failed(self) -> bool:
        """Whether a number recorded since the last check is not finite; synchronises."""
        return not (math.isfinite(float(self._loss)) and math.isfinite(float(self._norm)))

    def skip(self, epoch: int, step: int) -> None:
        """Skip the step, or end the run; all processes call it, if one has a bad number."""
        self.skipped += 1
        if self.skipped > self.limit:
            self._stop(epoch, step)
        model = self.context.trained if self.context.sharded else self.context.model
        spoilt = [n for n, x in model.named_buffers() if not bool(torch.isfinite(x).all())]
        if spoilt:
            self._warn(f"the buffer {spoilt[0]} is not finite: the step cannot be skipped")
            self._stop(epoch, step)
        self._warn(
            f"step {step} is skipped, {self._reason()} ({self.skipped} of at most "
            f"{self.limit} by run.max_skipped){self._save(epoch, step)}"
        )
        scaler = self.context.accelerator.scaler
        if scaler is not None and scaler.is_enabled():
            scaler.update(scaler.get_scale())  # resets the scaler's check of this gradient
        self._clear()

    def check(self, epoch: int, step: int) -> None:
        """End the run if a number recorded since the last check is not finite."""
        if self.failed:
            self._stop(epoch, step)
        self._clear()

    def _clear(self) -> None:
        self._recent: list[dict[str, Any]] = []
        self._batches: list[Any] = []
        # Sums: they are not finite if one number is not.
        self._loss: Tensor | float = 0.0
        self._norm: Tensor | float = 0.0

    def _warn(self, text: str) -> None:
        if self.context.directory is not None:  # main process only
            self.context.progress.warn(text)

    def _reason(self) -> str:
        loss, norm = float(self._loss), float(self._norm)
        if not math.isfinite(loss):
            return f"the loss became {loss}"
        if not math.isfinite(norm):
            return f"the norm of the gradient became {norm}"
        return "in another process the loss was not finite"

    def _save(self, epoch: int, step: int) -> str:
        """Write names and tensors of the batches; return a note with the paths of the files."""
        directory, files = self.context.directory, []
        if directory is None:
            return ""
        if any(batch["names"] for batch in self._recent):
            directory.write_json("nonfinite.json", {"epoch": epoch, "batches": self._recent})
            files.append(f"{directory / 'nonfinite.json'} lists the images")
        tensors = dict(_tensors(self._batches))
        if tensors:
            path = directory / f"nonfinite-step{step}.safetensors"
            save_tensors(path, tensors, {"epoch": epoch, "step": step})
            files.append(f"{path} has the batch")
        return f" ({'; '.join(files)})" if files else ""

    def _stop(self, epoch: int, step: int) -> NoReturn:
        past = f", after {self.limit} skipped steps" if self.limit else ""
        raise UserError(
            f"{self._reason()} in epoch {epoch}, by step {step}, at a learning rate of "
            f"{self.context.learning_rate:.3g}{past}{self._save(epoch, step)}; "
            f"{self.context.task.advice}"
        )


def gradient_norm(accelerator: Accelerator, model: nn.Module, clip: float | None) -> Tensor:
    """Return the norm of the gradient, and clip it to ``clip`` unless that is None."""
    if clip is not None:
        norm = accelerator.clip_grad_norm_(model.parameters(), clip)
    else:
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a batch of any type, with dotted names."""
    if isinstance(value, Tensor):
        yield name, value
        return
    value = vars(value) if dataclasses.is_dataclass(value) else value
    parts: Any = enumerate(value) if isinstance(value, list | tuple) else ()
    if isinstance(value, dict):
        parts = value.items()
    for key, part in parts:
        yield from _tensors(part, f"{name}.{key}" if name else str(key))
