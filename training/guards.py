"""What must not pass unseen: figures that are not finite, and loader processes that die."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training.checkpoints import save_tensors
from training.errors import Interrupted, UserError, one_line
from training.runfolder import RunFolder


class FiniteGuard:
    """Decides about each step whether its gradient may reach the weights.

    Up to ``limit`` steps are left out; the next one, or the first if the limit is 0, ends the run.
    On a GPU and without a limit the figures stay on the device, where they cost nothing, and are
    read by :meth:`look` now and then: the run ends a few steps late, but before anything is saved.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        folder: RunFolder | None,
        limit: int,
        advice: str,
        warn: Callable[[str], None],
    ) -> None:
        self.accelerator, self.model, self.folder = accelerator, model, folder
        self.limit, self.advice, self.warn = limit, advice, warn
        self.skipped = 0
        self.prompt = limit > 0 or accelerator.device.type == "cpu"
        self._recent: list[dict[str, Any]] = []  # the batches since they were last looked at
        self._loss: Tensor | None = None  # their sum, so that one that is not finite stays
        self._norm: Tensor | None = None
        self._batches: list[Any] = []

    def add(self, step: int, loss: Tensor, names: list[Any], batch: Any) -> None:
        """Take note of a batch and the loss that it gave."""
        loss = loss.detach().double()
        self._loss = loss if self._loss is None else self._loss + loss
        self._recent.append({"step": step, "names": names})
        if self.prompt:
            self._batches.append(batch)

    def add_norm(self, norm: Tensor) -> None:
        """Take note of the norm of a step's gradient."""
        # fp16 overflows now and then; its scaler leaves such a step out and scales less.
        scaler = self.accelerator.scaler
        if scaler is None or scaler.get_scale() < 1:
            norm = norm.detach().double()
            self._norm = norm if self._norm is None else self._norm + norm

    @property
    def broken(self) -> bool:
        """Whether what was noted since the last :meth:`look` is not finite; waits for a GPU."""
        return not all(math.isfinite(float(x)) for x in (self._loss, self._norm) if x is not None)

    def skip(self, epoch: int, step: int, rate: float) -> None:
        """Leave the step out, or end the run; in all processes as soon as it is so in one."""
        self.skipped += 1
        if self.skipped > self.limit:
            self._stop(epoch, step, rate)
        spoilt = [n for n, x in self.model.named_buffers() if not bool(torch.isfinite(x).all())]
        if spoilt:
            self.warn(f"the buffer {spoilt[0]} is not finite any more: the step cannot be left out")
            self._stop(epoch, step, rate)
        self.warn(
            f"step {step} is left out, {self._what()} ({self.skipped} of at most "
            f"{self.limit} by run.max_skipped){self._note(epoch, step)}"
        )
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.is_enabled():
            scaler.update(scaler.get_scale())  # forget that it has looked at this gradient
        self._clear()

    def look(self, epoch: int, step: int, rate: float) -> None:
        """End the run if what was noted since the last time is not finite."""
        if self.broken:
            self._stop(epoch, step, rate)
        self._clear()

    def _clear(self) -> None:
        self._recent.clear()
        self._batches.clear()
        self._loss = self._norm = None

    def _what(self) -> str:
        loss = 0.0 if self._loss is None else float(self._loss)
        if not math.isfinite(loss):
            return f"the loss became {loss}"
        norm = 0.0 if self._norm is None else float(self._norm)
        if not math.isfinite(norm):
            return f"the norm of the gradient became {norm}"
        return "in another process the loss was not finite"

    def _note(self, epoch: int, step: int) -> str:
        """Write what the batches were, and say where."""
        if self.folder is None:
            return ""
        files = []
        if any(batch["names"] for batch in self._recent):
            self.folder.write_json("nonfinite.json", {"epoch": epoch, "batches": self._recent})
            files.append(f"{self.folder / 'nonfinite.json'} names the images")
        tensors = dict(_tensors(self._batches))
        if tensors:
            path = self.folder / f"nonfinite-step{step}.safetensors"
            save_tensors(path, tensors, {"epoch": epoch, "step": step})
            files.append(f"{path} holds the batch")
        return f" ({'; '.join(files)})" if files else ""

    def _stop(self, epoch: int, step: int, rate: float) -> NoReturn:
        past = f", after {self.limit} steps left out" if self.limit else ""
        raise UserError(
            f"{self._what()} in epoch {epoch}, by step {step}, at a learning rate of {rate:.3g}"
            f"{past}{self._note(epoch, step)}; {self.advice}"
        )


def gradient_norm(accelerator: Accelerator, model: nn.Module, clip: float | None) -> Tensor:
    """Return the norm of the gradient; it is clipped to ``clip`` unless that is None."""
    if clip is not None:
        norm = accelerator.clip_grad_norm_(model.parameters(), clip)
    else:
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def watched_loader(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield the batches; a loader process that died becomes one clear error."""
    try:
        yield from batches
    except RuntimeError as error:
        died = re.search(r"DataLoader worker .*", one_line(error))
        if died is None:
            raise
        raise Interrupted(
            f"a process that loads data died ({died[0]:.160}); often memory ran out: fewer "
            "data.workers or a smaller batch_size may help; --resume auto goes on"
        ) from error


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors inside a batch, whatever it is made of, with dotted names."""
    if isinstance(value, Tensor):
        yield name, value
        return
    if dataclasses.is_dataclass(value):
        parts = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif isinstance(value, dict):
        parts = list(value.items())
    elif isinstance(value, list | tuple):
        parts = list(enumerate(value))
    else:
        parts = []
    for key, part in parts:
        yield from _tensors(part, f"{name}.{key}" if name else str(key))
