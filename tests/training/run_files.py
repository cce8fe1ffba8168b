"""What a run left in its folder."""

import re
from pathlib import Path
from typing import Any

import torch

from training.checkpoint import States


def files(folder: Path) -> set[str]:
    """All files of a run, the checksums in the names of its states left out."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {re.sub(r"-[0-9a-f]{16}\.pt$", ".pt", name) for name in found}


def newest_state(folder: Path) -> dict[str, Any]:
    return torch.load(States(folder / "checkpoints").paths()[0], weights_only=True)
