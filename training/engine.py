"""Where a run computes: accelerate's view of devices, precision and processes."""

from __future__ import annotations

import os
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from training.errors import UserError
from training.options import RunConfig

Value = TypeVar("Value")
_ACCELERATE_NAMES = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def make_accelerator(config: RunConfig) -> Accelerator:
    """Create the accelerator. Raises :class:`UserError` for fp16 without a GPU, and for FSDP.

    Accumulation is the loop's business, and loaders are never handed to ``prepare``.
    """
    if config.threads is not None:
        if config.threads < 1:
            raise UserError(f"run.threads: {config.threads} is not at least 1")
        torch.set_num_threads(config.threads)
    if config.precision == "fp16" and (config.device == "cpu" or not torch.cuda.is_available()):
        raise UserError("run.precision: fp16 needs a GPU; on a CPU use bf16 or fp32")
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        # On a CPU accelerate would make it DDP without a word.
        raise UserError(
            "ACCELERATE_USE_FSDP: these scripts cannot save sharded weights; launch them "
            "without FSDP, as `accelerate launch --multi_gpu`, and they run with DDP"
        )
    return Accelerator(
        mixed_precision=_ACCELERATE_NAMES[config.precision], cpu=config.device == "cpu"
    )


def per_process_batch(accelerator: Accelerator, batch_size: int, accumulate: int) -> int:
    """Return the images of one forward pass of one process; the step's must divide evenly."""
    parts = accelerator.num_processes * accumulate
    if batch_size < 1 or accumulate < 1 or batch_size % parts:
        raise UserError(
            f"batch_size: {batch_size} does not divide into {accelerator.num_processes} processes "
            f"x {accumulate} accumulated batches (grad_accum_steps)"
        )
    return batch_size // parts


def from_main_process(accelerator: Accelerator, value: Value) -> Value:
    """Return the main process's ``value`` in every process."""
    box = [value]
    if accelerator.num_processes > 1:
        broadcast_object_list(box)
    return box[0]
