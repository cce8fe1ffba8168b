"""The folder a run leaves: config, metrics, checkpoints, pictures, and a sign of life."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from training.checkpoints import replacing
from training.errors import UserError

_BEAT = 10.0  # seconds between two signs of life


class RunFolder:
    """One run's folder. A name that is taken gets the next free number: no run is overwritten.

    Raises :class:`UserError` when the folder cannot be made or written.
    """

    def __init__(self, output: str | Path, name: str) -> None:
        self._open(_make(Path(output), name))

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """Return the folder of a run that goes on."""
        folder = cls.__new__(cls)
        folder._open(path)
        return folder

    def _open(self, path: Path) -> None:
        self.path, self.metrics_path = path, path / "metrics.jsonl"
        self._waiting = ""  # lines that a full disk has not taken yet
        self._beaten = -math.inf

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def log(self, record: dict[str, Any]) -> None:
        """Append one JSON object as a line to ``metrics.jsonl``; non-finite numbers become null.

        Raises :class:`UserError` where it cannot be written; it is then written with the next one.
        """
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        self._waiting += json.dumps(clean, allow_nan=False) + "\n"
        try:
            with self.metrics_path.open("ab", buffering=0) as file:
                before, content = file.tell(), self._waiting.encode()
                try:
                    while content:
                        content = content[file.write(content) :]
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(before)
                    raise
        except OSError as error:
            raise UserError(f"cannot write {str(self.metrics_path)!r}: {error.strerror}") from error
        self._waiting = ""

    def forget_after(self, epoch: int) -> None:
        """Leave out the records of epochs after ``epoch``, which will be trained again."""
        kept = [record for record in self.records() if record["epoch"] <= epoch]
        lines = [json.dumps(record, allow_nan=False) + "\n" for record in kept]
        with replacing(self.metrics_path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")

    def write_text(self, name: str, text: str) -> None:
        """Write a small text file into the folder."""
        with replacing(self.path / name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def write_json(self, name: str, content: Any) -> None:
        """Write ``content`` as indented JSON into the folder."""
        self.write_text(name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """Return what was logged so far; a line that a crash cut short is left out."""
        if not self.metrics_path.exists():
            return []
        lines = self.metrics_path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def beat(self, status: str, **where: Any) -> None:
        """Write ``progress.json``: when the run last got on, and where it was then.

        Every ten seconds at most while the status is "running". A disk that is full is left to
        those who write what matters.
        """
        now = time.monotonic()
        if status == "running" and now - self._beaten < _BEAT:
            return
        self._beaten = now
        clock = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        with contextlib.suppress(UserError):
            self.write_json("progress.json", {"status": status, "time": clock, **where})

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        try:
            told = json.loads((self.path / "progress.json").read_text(encoding="utf-8"))
            return told["status"] == "finished"
        except (OSError, ValueError, KeyError, TypeError):
            return False


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
