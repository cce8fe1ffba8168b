"""Devices and processes: accelerate's setup, agreement of processes, FSDP2, recomputing."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, get_int_from_env
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from training.errors import Interrupted, UserError, one_line
from training.options import RunConfig
from training.report import check_trackers

Value = TypeVar("Value")
_ACCELERATE_NAMES = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_MOST_WORKERS = 8  # more workers are rarely faster, and each uses memory
_STREAM_WORKERS = 4
_FULL = StateDictOptions(full_state_dict=True)
# Messages of gloo, NCCL and torch's store about a lost connection.
_LOST = re.compile(r"(?i)gloo|nccl|connection (closed|reset|refused)|broken pipe|tcpstore")


def make_accelerator(config: RunConfig) -> Accelerator:
    """Create the accelerator; the loop accumulates gradients itself.

    Raises:
        UserError: for fp16 without a GPU, and for unsupported options of ``accelerate launch``.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.precision == "fp16" and (config.device == "cpu" or not torch.cuda.is_available()):
        raise UserError("run.precision: fp16 needs a GPU; on a CPU use bf16 or fp32")
    check_trackers(config.trackers)
    _check_launcher()
    return Accelerator(
        mixed_precision=_ACCELERATE_NAMES[config.precision], cpu=config.device == "cpu"
    )


def _check_launcher() -> None:
    """Raise for options of ``accelerate launch`` that would be ignored or conflict."""
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            # On a CPU accelerate silently uses DDP instead of FSDP.
            raise UserError(
                f"accelerate launch is set to {name}, which these scripts do not support; leave it "
                "out for DDP, or shard with torchrun and run.shard: true (FSDP2)"
            )
    alone = "MASTER_ADDR" in os.environ and not any(
        name in os.environ for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
    )
    if alone and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        raise UserError(
            "accelerate launch ignores --num_processes on a CPU and starts one process; "
            "use torchrun --nproc_per_node"
        )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        raise UserError(
            f"accelerate launch is set to {steps} accumulated batches, which would divide the loss "
            "twice; set grad_accum_steps instead"
        )


def loader_workers(given: int | None, *, digits: bool, streams: bool = False) -> int:
    """Return the number of loader processes of this process.

    Args:
        given: the option data.workers; None: by the number of CPU cores of the host.
        digits: whether the data set is embedded; loader processes would be slower.
        streams: whether the data set is a stream, whose order depends on the number; the default
            is then the same on every host.
    """
    if given is not None:
        return given
    if digits:
        return 0
    if streams:
        return _STREAM_WORKERS
    names = ["LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE"]
    share = len(os.sched_getaffinity(0)) // max(1, get_int_from_env(names, 1))
    return min(_MOST_WORKERS, share)


def per_process_batch(accelerator: Accelerator, batch_size: int, accumulate: int) -> int:
    """Return the batch size of one forward pass of one process.

    Raises:
        UserError: if ``batch_size`` is not a multiple of processes times ``accumulate``.
    """
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


class Processes:
    """Agreement between the processes of a run after each step.

    It uses gloo also when gradients use NCCL: gloo needs no GPU synchronisation, and raises
    immediately when a process is killed.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.several = accelerator.num_processes > 1
        self._group = None
        if self.several and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")

    def max(self, *flags: int) -> tuple[int, ...]:
        """Return the maximum over all processes of each flag."""
        if not self.several:
            return flags
        values = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group)
        return tuple(values.tolist())

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Raise :class:`Interrupted` if the connection to another process is lost."""
        try:
            yield
        except RuntimeError as error:
            if not self.several or not _LOST.search(str(error)):
                raise
            raise Interrupted(
                f"another process of this job ended or cannot be reached ({one_line(error):.120}); "
                "the job ends; the same command with --resume auto resumes it"
            ) from error


def recompute(layers: Iterable[nn.Module]) -> None:
    """Recompute the activations of each layer in the backward pass; parameter names stay."""
    for layer in layers:
        layer.forward = functools.partial(_run, layer.forward)


def _run(forward: Callable[..., Any], *given: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*given, **named)
    # use_reentrant=True supports neither keyword arguments nor gradients of captured tensors.
    return checkpoint(forward, *given, use_reentrant=False, **named)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers: modules in a ModuleList or Sequential with attention as a child."""
    found: dict[nn.Module, None] = {}
    for parent in model.modules():
        for layer in parent.children() if isinstance(parent, nn.ModuleList | nn.Sequential) else ():
            inside = layer.named_children()
            if any("attn" in name or "attention" in type(x).__name__.lower() for name, x in inside):
                found[layer] = None
    return list(found)


class Sharded:
    """A sharded copy (FSDP2) of a model; every process also has the whole model.

    Evaluations, averages and files use the whole model, so processes may evaluate different numbers
    of batches. Every process must call each method.

    Attributes:
        model: the sharded copy to train.
    """

    def __init__(self, whole: nn.Module, accelerator: Accelerator, config: RunConfig) -> None:
        self.whole, self.main = whole, accelerator.is_main_process
        for value in whole.state_dict().values():  # as in DDP, start from the same weights
            dist.broadcast(value, 0)
        model = copy.deepcopy(whole)
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        policy = MixedPrecisionPolicy()
        if config.precision == "bf16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in reversed(layers_of(model)):  # inner layers before outer ones
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        # No policy: parameters outside layers stay in fp32, under autocast.
        fully_shard(model, mesh=mesh)
        # DETR returns views, and no loss writes to outputs in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
        # With evaluation_mode, accelerate adds autocast, but not DDP.
        self.model = accelerator.prepare_model(model, evaluation_mode=True)

    @torch.no_grad()
    def gather(self) -> None:
        """Copy the sharded weights, and the buffers of the main process, to the whole model."""
        full = get_model_state_dict(self.model, options=_FULL)
        self.whole.load_state_dict(full)
        for value in self.whole.buffers():
            dist.broadcast(value, 0)

    @torch.no_grad()
    def scatter(self) -> None:
        """Copy the whole model's weights into the sharded model."""
        set_model_state_dict(self.model, self.whole.state_dict(), options=_FULL)

    def full(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the state of an optimiser, unsharded and on the CPU.

        Only the main process gets the tensors.
        """
        state = optimizer.state_dict()
        # Copy: these dicts belong to the optimiser.
        state["state"] = {index: dict(kept) for index, kept in state["state"].items()}
        for index, parameter in _numbered(optimizer).items():
            for name, value in state["state"].get(index, {}).items():
                if isinstance(value, Tensor) and value.dim():
                    if not isinstance(value, DTensor) or value.shape != parameter.shape:
                        raise UserError(
                            "run.shard: the state of this optimiser differs in shape from the "
                            "weights and cannot be saved; use another optimiser, such as adamw "
                            "or sgd"
                        )
                    full = value.full_tensor()
                    state["state"][index][name] = full.cpu() if self.main else None
        return state

    def load_full(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Load the result of :meth:`full`, or the state of a run without sharding."""
        parameters = _numbered(optimizer)
        values = {
            index: {name: _shard_like(value, parameters[index]) for name, value in kept.items()}
            for index, kept in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": values})


def _numbered(optimizer: torch.optim.Optimizer) -> dict[int, Tensor]:
    """Return the parameters by index in the optimiser's state."""
    return dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))


def _shard_like(value: Any, wanted: Tensor) -> Any:
    """Return this process's part of ``value`` if ``wanted`` is sharded, of the same shape."""
    if not isinstance(wanted, DTensor) or not isinstance(value, Tensor) or value.dim() == 0:
        return value
    value = value.to(wanted.device, wanted.dtype)
    # src_data_rank=None: all processes have the value, so nothing is sent.
    return distribute_tensor(value, wanted.device_mesh, wanted.placements, src_data_rank=None)
