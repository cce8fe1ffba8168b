"""One process and two over gloo: step time and gradient bytes, beside what arithmetic expects.

    python benchmarks/scaling.py

Each process has the same batch (weak scaling), so that with a core for each a step of two would
take the time of one, and the all-reduce of the gradient. On fewer cores the processes' computing
adds up. ``docs/scale.md`` has the model that these results check.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from measure import machine, save, suffix
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import irpe

SPEC = "rpe-1.9-product-ctx-1-k"


def work(rank: int, world: int, store: str, options: argparse.Namespace, out: Any) -> None:
    """Run one process: steps, then all-reduces alone; the first writes its results into ``out``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = timm.create_model(options.model, img_size=options.size)
    irpe.attach(model, SPEC)
    parallel, sent = DistributedDataParallel(model), [0]

    def counted(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sent[0] += bucket.buffer().nbytes
        return allreduce_hook(group, bucket)

    parallel.register_comm_hook(None, counted)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images = torch.randn(options.batch, 3, options.size, options.size)
    targets = torch.zeros(options.batch, dtype=torch.long)
    seconds, processor, bytes_ = [], [], []
    for _ in range(options.warm_up + options.steps):
        sent[0] = 0
        dist.barrier()
        start, cpu = time.perf_counter(), time.process_time()
        F.cross_entropy(parallel(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - cpu)
        bytes_.append(sent[0])
    gradient = torch.zeros(sum(p.numel() for p in model.parameters()))
    reduce = []
    for _ in range(options.warm_up + options.steps):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(gradient)
        reduce.append(time.perf_counter() - start)
    if rank == 0:
        kept = slice(options.warm_up, None)
        out["seconds"] = statistics.median(seconds[kept])
        out["processor_seconds"] = statistics.median(processor[kept])
        out["gradient_bytes"] = bytes_[-1]
        out["parameter_bytes"] = gradient.nbytes
        out["reduce_seconds"] = statistics.median(reduce[kept])
    dist.barrier()
    dist.destroy_process_group()


def measured(world: int, options: argparse.Namespace) -> dict[str, float]:
    with multiprocessing.Manager() as manager, tempfile.TemporaryDirectory() as folder:
        out = manager.dict()
        given = (world, str(Path(folder) / "store"), options, out)
        multiprocessing.start_processes(work, given, nprocs=world, start_method="spawn")
        return dict(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--name", help="of the result file; none is written without it")
    options = parser.parse_args()
    one, two = measured(1, options), measured(2, options)
    cores = len(os.sched_getaffinity(0))
    compute = one["seconds"] * max(1.0, 2 / cores)
    # In a ring of P each process sends and receives 2 (P - 1) / P of the gradient: all of it for 2.
    expected = compute + two["reduce_seconds"]
    figures = {
        "command": "python benchmarks/scaling.py",
        "machine": machine(),
        **vars(options),
        "cores": cores,
        "one": one,
        "two": two,
        "expected_seconds_of_two": expected,
        "measured_over_expected": two["seconds"] / expected,
    }
    for name, row in (("one process", one), ("two processes", two)):
        print(
            f"{name}: {row['seconds']:.3f} s a step, {row['processor_seconds']:.3f} s of a core in "
            f"each, {row['gradient_bytes'] / 1e6:.2f} MB of gradients, all-reduce alone "
            f"{row['reduce_seconds']:.4f} s"
        )
    print(
        f"on {cores} cores a step of two is expected to take {compute:.3f} s of computing + "
        f"{two['reduce_seconds']:.3f} s of all-reduce = {expected:.3f} s; measured "
        f"{two['seconds']:.3f} s ({two['seconds'] / expected:.2f} of that)"
    )
    if options.name:
        print(save(f"{options.name}_{suffix('cpu')}", figures))


if __name__ == "__main__":
    main()
