"""train_lm.py on a network and a text that train in a second, and what its runs leave."""

import json
from pathlib import Path

import torch

from irpe.files.read import read_weights

TINY_TASK = [
    "--data.name=files",
    "--model.dim=16",
    "--model.depth=2",
    "--model.num_heads=2",
    "--epochs=4",
    "--eval_batch_size=4",
    "--sched.warmup_epochs=0",
    "--optim.lr=0.01",
    "--run.progress=none",
    "--run.threads=1",
]
TINY = [
    *TINY_TASK,
    "--steps_per_epoch=3",
    "--budget=128",
    "--stages=[{length: 16}]",
    "--eval_tokens=300",
    "--sample=20",
]
STAGED = "--stages=[{length: 8, until: 5}, {length: 16}]"
TIMES = ("seconds", "tokens_per_second", "texts_per_second", "train_cpu_seconds")


def records(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def weights(folder: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return read_weights(folder / "checkpoints" / f"{name}.safetensors")


def same(one: Path, other: Path, *names: str) -> bool:
    pairs = [(weights(one, name), weights(other, name)) for name in names or ("last", "best")]
    return all(torch.equal(a[key], b[key]) for a, b in pairs for key in a)
