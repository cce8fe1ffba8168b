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
    """Create the accelerator.

    Raises :class:`UserError` for fp16 without a GPU, and for FSDP and its like by the launcher.

    Accumulation is the loop's business, and loaders are never handed to ``prepare``.
    """
    if config.threads is not None:
        if config.threads < 1:
            raise UserError(f"run.threads: {config.threads} is not at least 1")
        torch.set_num_threads(config.threads)
    if config.precision == "fp16" and (config.device == "cpu" or not torch.cuda.is_available()):
        raise UserError("run.precision: fp16 needs a GPU; on a CPU use bf16 or fp32")
    _check_launcher()
    return Accelerator(
        mixed_precision=_ACCELERATE_NAMES[config.precision], cpu=config.device == "cpu"
    )


def _check_launcher() -> None:
    """Raise for what ``accelerate launch`` asks for and would not get, or get beside the config."""
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            # On a CPU accelerate makes DDP of FSDP, without a word.
            raise UserError(
                f"accelerate launch asks for {name}, which these scripts do not train with (on a "
                "CPU it would be DDP all the same); leave it out for DDP, or shard with torchrun "
                "and run.shard: true (FSDP2)"
            )
    alone = "MASTER_ADDR" in os.environ and not any(
        name in os.environ for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
    )
    if alone and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        raise UserError(
            "accelerate launch starts one process on a CPU, whatever --num_processes says; "
            "use torchrun --nproc_per_node"
        )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        raise UserError(
            f"accelerate launch asks for {steps} accumulated batches, which would divide the loss "
            "once more; set grad_accum_steps instead"
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
