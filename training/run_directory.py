"""Run directories: config, metrics, checkpoints, pictures, a lock, and the run to resume.

Every random decision uses a seed derived from its coordinates (training/seeding.py), so a resumed
run computes the same as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from filelock import SoftFileLock, Timeout

from training import config as configuration
from training.checkpoint import States, read_state, replacing
from training.distributed import from_main_process
from training.errors import UserError, one_line

_LOCK = ".lock"
_INTERVAL = 10.0  # seconds between two updates of progress.json
# Options that may differ in a resumed run: they do not change results, except rounding (shard).
_FREE = ("resume", "allow_changed_data", *(f"run.{name}" for name in (
    "progress", "threads", "trackers", "output", "experiment",
    "save_every", "save_steps", "keep", "on_save_error", "max_skipped",
    "shard",
)))  # fmt: skip


class RunDirectory:
    """The directory of one run, locked until :meth:`close`.

    Raises:
        UserError: if it cannot be written, or another process has locked it.
    """

    def __init__(self, path: Path) -> None:
        self._lock = _locked(path)
        self.path, self.metrics_path = path, path / "metrics.jsonl"
        self._waiting = ""  # lines that are not written yet, since the disk was full
        self._updated = -math.inf

    def close(self, failed: bool = False) -> None:
        """Unlock the directory; if the run failed and wrote only the config, remove it."""
        if failed and {path.name for path in self.path.iterdir()} <= {"config.yaml", _LOCK}:
            (self.path / "config.yaml").unlink(missing_ok=True)
            self._lock.release()
            self.path.rmdir()
        else:
            self._lock.release()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def log(self, record: dict[str, Any]) -> None:
        """Append one JSON object as a line to ``metrics.jsonl``; non-finite numbers become null.

        Raises:
            UserError: if it cannot be written; the next call then writes it.
        """
        clean = {k: None if x in (math.inf, -math.inf) or x != x else x for k, x in record.items()}
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
        """Remove the records of epochs after ``epoch``, which are trained again."""
        kept = [record for record in read_records(self.path) if record["epoch"] <= epoch]
        lines = [json.dumps(record, allow_nan=False) + "\n" for record in kept]
        self.write_text("metrics.jsonl", "".join(lines))

    def write_text(self, name: str, text: str) -> None:
        """Write a small text file into the directory."""
        with replacing(self.path / name) as temporary:
            # Surrogates: file names that are not UTF-8.
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")

    def write_json(self, name: str, content: Any) -> None:
        """Write ``content`` as indented JSON into the directory."""
        self.write_text(name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def update(self, status: str, **where: Any) -> None:
        """Write status, time and ``where`` to ``progress.json``.

        With status "running", this writes at most every ten seconds. Errors are ignored: more
        important files raise them too.
        """
        now = time.monotonic()
        if status == "running" and now - self._updated < _INTERVAL:
            return
        self._updated = now
        clock = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        with contextlib.suppress(UserError):
            self.write_json("progress.json", {"status": status, "time": clock, **where})


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of the run in the directory ``path``, without an incomplete last line."""
    metrics = path / "metrics.jsonl"
    if not metrics.exists():
        return []
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def finished(path: Path) -> bool:
    """Return whether the run in the directory ``path`` has finished."""
    try:
        content = json.loads((path / "progress.json").read_text(encoding="utf-8"))
        return content["status"] == "finished"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def running(path: Path) -> bool:
    """Return whether a living process has locked the run in the directory ``path``."""
    try:
        _locked(path).release()
    except UserError:
        return True
    return False


@contextlib.contextmanager
def open_run(
    accelerator: Accelerator, config: Any, name: str
) -> Iterator[tuple[RunDirectory | None, dict[str, Any] | None]]:
    """Open a run directory, new or to resume, and lock it until the end.

    After an error, a directory with only the config is removed. In a resumed run the caller writes
    the config after its checks.

    Args:
        accelerator: joins the processes.
        config: configuration of a script; its ``resume`` is null, "auto" (the newest run of this
            name that is neither finished nor in progress, else a new run) or a run directory.
        name: name of the run, if ``config.run.experiment`` is null.

    Yields:
        The directory on the main process, else None; and the state to resume from, or None.

    Raises:
        UserError: in every process, if the directory cannot be written or has no valid state, or
            its run has another configuration or is in progress.
    """
    name = (config.run.experiment or name).replace("/", "_").replace(":", "_")
    directory, problem, found, state = None, None, None, None
    if accelerator.is_main_process:
        try:
            found = _find(config, name)
            if found is None:
                directory = RunDirectory(_make(Path(config.run.output), name))
                directory.write_text("config.yaml", configuration.dump(config))
            else:
                _check_same(config, found)
                directory = RunDirectory(found)
                found, state = States(found / "checkpoints").newest()
                States(found.parent).forget_after(found)
                directory.forget_after(state["epoch"])
        except UserError as error:
            problem = str(error)
    problem, path = from_main_process(accelerator, (problem, found and str(found)))
    failed = True
    try:
        if problem is not None:
            raise UserError(problem)
        if path is not None and state is None:
            state = read_state(Path(path))
        yield directory, state
        failed = False
    finally:
        if directory is not None:
            directory.close(failed)


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested sections by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and value:
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = value
    return found


def _find(config: Any, name: str) -> Path | None:
    """Return the directory of the run to resume, or None for a new run."""
    if config.resume is None:
        return None
    if config.resume != "auto":
        path = Path(config.resume)
        if not States(path / "checkpoints").paths():
            raise UserError(
                f"resume: {config.resume!r} has no checkpoints/state-*.pt; give the directory of "
                "a run that has saved one, or auto"
            )
        if finished(path) and not _extended(config, _read_config(path)):
            raise UserError(
                f"resume: the run in {config.resume!r} has finished its {len(read_records(path))} "
                "epochs; more epochs would extend it"
            )
        return path
    taken = re.compile(re.escape(name) + r"(?:-(\d+))?")
    output = Path(config.run.output)
    names = [path.name for path in output.iterdir()] if output.is_dir() else []
    numbered = [(int(m.group(1) or 1), m.group(0)) for m in map(taken.fullmatch, names) if m]
    for _, found in sorted(numbered, reverse=True):
        path = output / found
        resumable = States(path / "checkpoints").paths() and not finished(path)
        if resumable and not running(path):
            return path
    return None


def _read_config(path: Path) -> dict[str, Any]:
    """Return the options of the run in ``path``, by their dotted names."""
    file = path / "config.yaml"
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"resume: cannot read {str(file)!r}: {one_line(error)}") from error
    return flat(content) if isinstance(content, dict) else {}


def _check_same(config: Any, path: Path) -> None:
    """Raise unless the run in ``path`` has the same configuration."""
    before, now = _read_config(path), flat(yaml.safe_load(configuration.dump(config)))
    differing = [
        f"{key} (was {before.get(key)!r}, is {now.get(key)!r})"
        for key in {**before, **now}
        if key not in _FREE and before.get(key) != now.get(key)
        if key != "epochs" or not _extended(config, before)
    ]
    if differing:
        raise UserError(
            f"resume: the run in {str(path)!r} was started with another configuration: "
            f"{', '.join(differing[:6])}; repeat its command, or start a new run without resume"
        )


def _extended(config: Any, before: dict[str, Any]) -> bool:
    """Return whether a run is resumed with more epochs than it was started with."""
    # Runs of a language model cannot be extended: their plan depends on all steps.
    planned = getattr(config, "task", None) == "language"
    epochs = before.get("epochs")
    return not planned and isinstance(epochs, int) and config.epochs > epochs


def _locked(path: Path) -> SoftFileLock:
    """Lock a run directory for this process; replace the lock of a dead process of this host.

    Raises:
        UserError: if a living process, or another host, has locked it.
    """
    # Not a system lock: loader processes inherit it, and may outlive this process.
    lock = SoftFileLock(path / _LOCK, timeout=0, is_singleton=False, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        holder, since = "?", "?"
        with contextlib.suppress(OSError):
            file = path / _LOCK
            number, host, *_ = [*file.read_text(encoding="utf-8").split(), "?", "?"]
            holder = f"process {number} on {host}"
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(file.stat().st_mtime))
        raise UserError(
            f"the run in {str(path)!r} is in progress: {holder}, since {since}; wait for it or "
            f"end it, or remove {str(path / _LOCK)!r} if that process is gone"
        ) from None
    except OSError as error:
        raise UserError(f"cannot write {str(path / _LOCK)!r}: {error.strerror}") from error
    # A file open for writing would block remounting the file system read-only.
    descriptor = os.open(path / _LOCK, os.O_RDONLY)
    os.dup2(descriptor, lock._context.lock_file_fd)
    os.close(descriptor)
    return lock


def _make(output: Path, name: str) -> Path:
    """Create a directory; if the name exists, append the next free number."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            path = output / (name if number == 1 else f"{name}-{number}")
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                break
        # Try to write: permission bits do not show read-only mounts and quotas.
        probe = path / ".probe"
        probe.write_bytes(b"0")
        os.unlink(probe)
    except OSError as error:
        raise UserError(
            f"run.output: cannot write to {str(output)!r}: {error.strerror}; "
            "give a folder that can be written with --run.output"
        ) from error
    return path
