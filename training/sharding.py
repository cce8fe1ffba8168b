"""Sharded training (FSDP2): each process keeps a part of weights, gradients and optimiser state.

The model as the task built it stays beside the sharded one, whole, in every process. It takes the
gathered weights for evaluations, averages and files, so all of these are as without sharding, and
processes may evaluate different numbers of batches.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from training.errors import UserError
from training.options import RunConfig


def check_sharding(config: RunConfig, processes: int) -> None:
    """Raise :class:`UserError` where ``run.shard`` cannot be."""
    if not config.shard:
        return
    if config.precision == "fp16":
        raise UserError("run.shard: true does not go with run.precision: fp16; use bf16 or fp32")
    if config.compile:
        raise UserError("run.shard: true does not go with run.compile: true; leave one out")
    if processes < 2:
        raise UserError(
            "run.shard: true needs several processes, and this is one; start them with "
            "torchrun --nproc_per_node=N"
        )


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the repeated layers: what stands in a list and has attention right inside."""
    found: dict[nn.Module, None] = {}
    for parent in model.modules():
        for layer in parent.children() if isinstance(parent, nn.ModuleList | nn.Sequential) else ():
            inside = layer.named_children()
            if any("attn" in name or "attention" in type(x).__name__.lower() for name, x in inside):
                found[layer] = None
    return list(found)


class Sharded:
    """A sharded copy of a model, and what goes between the two.

    Every process must call each method, as all of them give their parts.

    Attributes:
        whole: the model that was given. model: the one to train, prepared by accelerate.
    """

    def __init__(self, whole: nn.Module, accelerator: Accelerator, config: RunConfig) -> None:
        self.whole, self.main = whole, accelerator.is_main_process
        for value in whole.state_dict().values():  # as DDP does: all begin with the same
            dist.broadcast(value, 0)
        model = copy.deepcopy(whole)
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        policy = MixedPrecisionPolicy()
        if config.precision == "bf16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in reversed(layers_of(model)):  # the inner ones before those around them
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        # What is outside of the layers stays in fp32, under the autocast of any run.
        fully_shard(model, mesh=mesh)
        # DETR's outputs are views. No loss here writes into an output.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
        # To accelerate it is prepared for an evaluation: that is autocast, but no DDP.
        self.model = accelerator.prepare_model(model, evaluation_mode=True)

    @torch.no_grad()
    def gather(self) -> None:
        """Let the whole model take the weights; buffers are the main process's, as with DDP."""
        own = self.model.state_dict()
        for name, value in self.whole.state_dict().items():
            if isinstance(own[name], DTensor):
                value.copy_(own[name].full_tensor())
            else:
                value.copy_(own[name])
                dist.broadcast(value, 0)

    @torch.no_grad()
    def scatter(self) -> None:
        """Let the sharded model take its parts of the whole one's weights."""
        own = self.model.state_dict()
        for name, value in self.whole.state_dict().items():
            own[name].copy_(_like(value, own[name]))

    def gathered(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return an optimiser's state as that of an optimiser without sharding, on the CPU.

        Only the main process gets its tensors.
        """
        state = optimizer.state_dict()
        figures = {}
        for index, parameter in _numbered(optimizer).items():
            figures[index] = {
                name: self._full(value, parameter)
                for name, value in state["state"].get(index, {}).items()
            }
        return {**state, "state": {index: kept for index, kept in figures.items() if kept}}

    def restore(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Take back what :meth:`gathered` returned, or the state of a run without sharding."""
        parameters = _numbered(optimizer)
        figures = {
            index: {name: _like(value, parameters[index]) for name, value in kept.items()}
            for index, kept in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": figures})

    def _full(self, value: Any, parameter: Tensor) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value.full_tensor() if isinstance(value, DTensor) else value
        if not isinstance(value, DTensor) or value.shape != parameter.shape:
            raise UserError(
                "run.shard: this optimiser keeps figures of another shape than the weights, and "
                "these cannot be saved; use one with a figure for each weight, as adamw or sgd"
            )
        full = value.full_tensor()
        return full.cpu() if self.main else None


def _numbered(optimizer: torch.optim.Optimizer) -> dict[int, Tensor]:
    """The parameters by their numbers in the optimiser's state."""
    return dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))


def _like(value: Any, wanted: Tensor) -> Any:
    """Return this process's part of ``value`` if ``wanted`` is sharded, of the same shape."""
    if not isinstance(wanted, DTensor) or not isinstance(value, Tensor) or value.dim() == 0:
        return value
    value = value.to(wanted.device, wanted.dtype)
    # All processes have the same value: none needs to be told.
    return distribute_tensor(value, wanted.device_mesh, wanted.placements, src_data_rank=None)
