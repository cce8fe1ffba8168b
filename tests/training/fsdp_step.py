"""One process of several: a step of a model sharded by ``fully_shard``, compared with a plain one.

    python tests/training/fsdp_step.py FILE

Prints how the tables lie. Rank 0 writes gradients and weights of both, for each model, into FILE.
"""

import copy
import sys

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

import irpe
from models.deit import DeiT

SPEC = "rpe-1.9-product-ctx-0-qkv"  # a table for each head, and two heads: one for each process
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "deit":
        model = DeiT(**SIZES, num_classes=5, rpe=SPEC)
    else:
        model = timm.create_model("vit_tiny_patch16_224", **SIZES, num_classes=5)
        irpe.attach(model, "rpe-1.9-product-ctx-1-qkv" if name == "shared" else SPEC)
    for key, parameter in model.named_parameters():
        if "lookup_table" in key:
            nn.init.normal_(parameter, std=0.3)
    return model.double()


def step(model: nn.Module, images, targets) -> torch.optim.Optimizer:
    # Some gradients are 0 in theory (a bias of keys that the class token alone reads), and 1e-18 by
    # rounding: a small eps would make steps of them.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-6)
    F.cross_entropy(model(images), targets).backward()
    optimizer.step()
    return optimizer


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def compare(name: str) -> dict:
    """Gradients of a sharded and of a plain step, then weights, by the parameter's name."""
    rank, world = dist.get_rank(), dist.get_world_size()
    plain = build(name)
    sharded = copy.deepcopy(plain)
    for block in sharded.blocks:
        fully_shard(block)
    fully_shard(sharded)
    images, targets = torch.randn(4, 3, 32, 32).double(), torch.tensor([0, 3, 2, 4])
    dist.broadcast(images, 0)
    step(plain, images, targets)
    own = slice(rank * 4 // world, (rank + 1) * 4 // world)
    step(sharded, images[own], targets[own])
    held = {}
    for key, parameter in sharded.named_parameters():
        assert isinstance(parameter, DTensor) and parameter.placements == (Shard(0),), key
        if "lookup_table" in key:
            print(name, key, list(parameter.shape), list(parameter.to_local().shape))
        grads = [whole(p.grad) for p in (parameter, plain.get_parameter(key))]
        held[key] = (*grads, whole(parameter), whole(plain.get_parameter(key)))
    return held


def main(file: str) -> None:
    dist.init_process_group("gloo")
    held = {name: compare(name) for name in ("attached", "shared", "deit")}
    if dist.get_rank() == 0:
        torch.save(held, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
