"""The folder a run leaves: config, metrics, checkpoints, pictures."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from training.errors import UserError


class RunFolder:
    """One run's folder. A name that is taken gets the next free number: no run is overwritten.

    Raises :class:`UserError` when the folder cannot be made or written.
    """

    def __init__(self, output: str | Path, name: str) -> None:
        self.path = _make(Path(output), name)
        self.metrics_path = self.path / "metrics.jsonl"

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """Return the folder of a run that goes on."""
        folder = cls.__new__(cls)
        folder.path = path
        folder.metrics_path = path / "metrics.jsonl"
        return folder

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def log(self, record: dict[str, Any]) -> None:
        """Append one JSON object as a line to ``metrics.jsonl``; non-finite numbers become null."""
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean, allow_nan=False) + "\n")

    def forget_after(self, epoch: int) -> None:
        """Leave out the records of epochs after ``epoch``, which will be trained again."""
        kept = [record for record in self.records() if record["epoch"] <= epoch]
        lines = [json.dumps(record, allow_nan=False) + "\n" for record in kept]
        self.write_text(self.metrics_path.name, "".join(lines))

    def write_text(self, name: str, text: str) -> None:
        """Write a small text file into the folder."""
        (self.path / name).write_text(text, encoding="utf-8")

    def write_json(self, name: str, content: Any) -> None:
        """Write ``content`` as indented JSON into the folder."""
        self.write_text(name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """Return what was logged so far."""
        if not self.metrics_path.exists():
            return []
        lines = self.metrics_path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def _make(output: Path, name: str) -> Path:
    try:
        output.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            path = output / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir()
                break
            except FileExistsError:
                number += 1
        # Permission bits do not tell (root, read-only mounts, quotas): write, then believe.
        probe = path / ".probe"
        probe.write_bytes(b"0")
        os.unlink(probe)
    except OSError as error:
        raise UserError(
            f"run.output: cannot write to {str(output)!r}: {error.strerror}; "
            "give a folder that can be written with --run.output"
        ) from error
    return path
