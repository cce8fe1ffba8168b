"""Go on with a run that was interrupted, from what its folder holds.

Every random decision starts from a seed derived from where it belongs (training/seeding.py), so a
run that goes on after any step does what one that was never interrupted would have done.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from training import config as configuration
from training.checkpoints import States, read_state
from training.engine import from_main_process
from training.errors import UserError, one_line
from training.runfolder import RunFolder

# What may differ between the two commands: none of it changes what is computed (sharding rounds).
_FREE = ("resume", *(f"run.{name}" for name in (
    "progress", "threads", "output", "experiment",
    "save_every", "save_steps", "keep", "on_save_error", "max_skipped",
    "shard",
)))  # fmt: skip


def open_folder(
    accelerator: Accelerator, config: Any, name: str
) -> tuple[RunFolder | None, dict[str, Any] | None]:
    """Make the run's folder, or open the one to go on with.

    Args:
        config: of a script; its ``resume`` is null, "auto" (the newest run of this name that is
            not finished; a new run if there is none) or a run folder.
        name: of the run, unless ``config.run.experiment`` gives one.

    Returns:
        The folder, on the main process, and the state to go on from, None for a new run.

    Raises:
        UserError: in every process, for a folder that cannot be written, holds no state, or whose
            run was started with another configuration.
    """
    name = (config.run.experiment or name).replace("/", "_").replace(":", "_")
    folder, problem, found, state = None, None, None, None
    if accelerator.is_main_process:
        try:
            found = _find(config, name)
            if found is None:
                folder = RunFolder(config.run.output, name)
                folder.write_text("config.yaml", configuration.dump(config))
            else:
                _check_same(config, found)
                folder = RunFolder.reopen(found)
                found, state = _newest(found)
                States(found.parent).forget_after(found)
                folder.forget_after(state["epoch"])
        except UserError as error:
            problem = str(error)
    problem, found = from_main_process(accelerator, (problem, found and str(found)))
    if problem is not None:
        raise UserError(problem)
    if found is None:
        return folder, None
    return folder, state if state is not None else read_state(Path(found))


def _newest(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the newest state that verifies, and its path."""
    told: list[str] = []
    newest = States(folder / "checkpoints").newest(told.append)
    if newest is None:
        raise UserError("; ".join(told))
    for line in told:
        print(f"warning: {line}; going on from the state before it", file=sys.stderr)
    return newest


def _find(config: Any, name: str) -> Path | None:
    if config.resume is None:
        return None
    if config.resume != "auto":
        path = Path(config.resume)
        if not States(path / "checkpoints").paths():
            raise UserError(
                f"resume: {config.resume!r} holds no checkpoints/state-*.pt; give the folder of a "
                "run that has saved one, or auto"
            )
        if RunFolder.reopen(path).finished:
            epochs = len(RunFolder.reopen(path).records())
            raise UserError(
                f"resume: the run in {config.resume!r} has finished its {epochs} epochs"
            )
        return path
    taken = re.compile(re.escape(name) + r"(?:-(\d+))?")
    output = Path(config.run.output)
    names = [path.name for path in output.iterdir()] if output.is_dir() else []
    numbered = [(int(m.group(1) or 1), m.group(0)) for m in map(taken.fullmatch, names) if m]
    for _, found in sorted(numbered, reverse=True):
        path = output / found
        if States(path / "checkpoints").paths() and not RunFolder.reopen(path).finished:
            return path
    return None


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"resume: cannot read {str(folder / 'config.yaml')!r}: {one_line(error)}"
        ) from error
    return content if isinstance(content, dict) else {}


def _check_same(config: Any, folder: Path) -> None:
    """Raise unless the run in ``folder`` was started with the same configuration."""
    before = _flat(_read_config(folder))
    now = _flat(yaml.safe_load(configuration.dump(config)))
    differing = [
        f"{key} (was {before.get(key)!r}, is {now.get(key)!r})"
        for key in {**before, **now}
        if key not in _FREE and before.get(key) != now.get(key)
    ]
    if differing:
        raise UserError(
            f"resume: the run in {str(folder)!r} was started with another configuration: "
            f"{', '.join(differing[:6])}; repeat its command, or start anew without resume"
        )


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
