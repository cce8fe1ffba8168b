"""Go on with a run that was interrupted, from what its folder holds.

Every random decision starts from a seed derived from where it belongs (training/seeding.py), so a
run that goes on at the end of an epoch does what one that was never interrupted would have done.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator

from training import config as configuration
from training.engine import from_main_process
from training.errors import UserError, one_line
from training.runfolder import RunFolder

STATE = "checkpoints/last-state.pt"
# What may differ between the two commands: none of it changes what is computed.
_FREE = ("resume", "run.progress", "run.threads", "run.output", "run.experiment", "run.save_every")


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
    folder, problem, found = None, None, None
    if accelerator.is_main_process:
        try:
            found = _find(config, name)
            if found is None:
                folder = RunFolder(config.run.output, name)
                folder.write_text("config.yaml", configuration.dump(config))
            else:
                _check_same(config, found)
                folder = RunFolder.reopen(found)
        except UserError as error:
            problem = str(error)
    problem, found = from_main_process(accelerator, (problem, found and str(found)))
    if problem is not None:
        raise UserError(problem)
    if found is None:
        return folder, None
    state = read_state(Path(found) / STATE)
    if folder is not None:
        folder.forget_after(state["epoch"])
    return folder, state


def read_state(path: Path) -> dict[str, Any]:
    """Read the state that a loop wrote; nothing but tensors and plain containers is built."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch reports a damaged archive in half a dozen ways
        raise UserError(
            f"resume: {str(path)!r} is truncated or not a training state: {one_line(error):.120}"
        ) from error


def _find(config: Any, name: str) -> Path | None:
    if config.resume is None:
        return None
    if config.resume != "auto":
        path = Path(config.resume)
        if not (path / STATE).is_file():
            raise UserError(
                f"resume: {config.resume!r} holds no {STATE}; give the folder of a run that has "
                "finished an epoch, or auto"
            )
        return path
    taken = re.compile(re.escape(name) + r"(?:-(\d+))?")
    output = Path(config.run.output)
    names = [path.name for path in output.iterdir()] if output.is_dir() else []
    numbered = [(int(m.group(1) or 1), m.group(0)) for m in map(taken.fullmatch, names) if m]
    for _, found in sorted(numbered, reverse=True):
        if (output / found / STATE).is_file():
            done = RunFolder.reopen(output / found).records()
            if not done or done[-1]["epoch"] < _epochs(output / found):
                return output / found
    return None


def _epochs(folder: Path) -> float:
    """The last epoch of a run, cool-down included."""
    content = _read_config(folder)
    return content.get("epochs", 0) + content.get("sched", {}).get("cooldown_epochs", 0)


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
