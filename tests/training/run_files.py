"""What a run left in its folder."""

import json
import re
from pathlib import Path
from typing import Any

import torch

from irpe.files.read import read_weights
from training.checkpoint import States

TIMES = (
    "seconds",
    "images_per_second",
    "tokens_per_second",
    "texts_per_second",
    "train_cpu_seconds",
)


def files(folder: Path) -> set[str]:
    """All files of a run, the checksums in the names of its states left out."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {re.sub(r"-[0-9a-f]{16}\.pt$", ".pt", name) for name in found}


def newest_state(folder: Path) -> dict[str, Any]:
    return torch.load(States(folder / "checkpoints").paths()[0], weights_only=True)


def records(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, without times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def weights(folder: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return read_weights(folder / "checkpoints" / f"{name}.safetensors")


def same(one: Path, other: Path, *names: str) -> bool:
    pairs = [(weights(one, name), weights(other, name)) for name in names or ("last", "best")]
    return all(torch.equal(a[key], b[key]) for a, b in pairs for key in a)


def assert_one_line(status: int, err: str, *parts: str) -> None:
    """A script ended with one line that says what is wrong."""
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert [part for part in parts if part not in err] == [], err
