"""Load a checkpoint: strictly for evaluation, with allowed differences for fine-tuning."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from typing import Any

from accelerate import PartialState
from torch import nn

import irpe
from irpe.files.fit import differences, fit
from irpe.files.read import read_checkpoint
from training.errors import UserError

_SHOWN = 4


def start_from(
    model: nn.Module,
    file: str,
    classes: dict[str, Any],
    heads: Iterable[nn.Module] = (),
    *,
    training: bool,
    by_name: Iterable[str] | None = None,
) -> str:
    """Load the weights of ``file`` into ``model``; return a line about the loaded tensors.

    Evaluation is strict. Training keeps the model's values of a classifier of another shape or of
    other classes and of tables that are not in the file, ignores tables that are not in the model,
    resizes absolute embeddings, and prints the line on the main process.

    Args:
        file: see ``irpe.load``.
        classes: :func:`identity` of the data.
        heads: the modules of ``model`` that depend on the classes.
        training: whether the model is trained, not only evaluated.
        by_name: the parts that may differ, for models of text. Only names and shapes are compared
            then, since a config may change encodings (rotary scaling, interpolated tables).

    Raises:
        irpe.IrpeError: if the weights do not fit.
        UserError: in evaluation, if the weights have other classes.
    """
    differing = difference(read_checkpoint(file).about, classes)
    if differing is not None and not training:
        raise UserError(f"checkpoint: {file!r} was trained on other classes: {differing}")
    own = [(head, copy.deepcopy(head.state_dict())) for head in heads]
    try:
        if by_name is not None:
            loaded = _load_by_name(model, file, frozenset(by_name))
        else:
            loaded = str(irpe.load(model, file, differ="head, positions, tables" * training or ()))
    except irpe.IrpeError as error:
        problem, advice, _ = str(error).partition(": irpe.")
        if not advice:
            raise
        raise UserError(
            f"checkpoint: {problem}; give the encoding that it was trained with (rpe, enc_rpe2d "
            "or encoding)"
        ) from error
    if differing is not None:
        for head, state in own:
            head.load_state_dict(state)
        loaded += f"; the classifier is left fresh, its classes differ: {differing}"
    if training and PartialState().is_main_process:
        print(loaded)
    return loaded


def _load_by_name(model: nn.Module, file: str, parts: frozenset[str]) -> str:
    found = fit(model, read_checkpoint(file).weights, parts)
    if found.wrong:
        raise UserError(
            f"checkpoint: {file!r} does not fit the model ({differences(found.wrong)}); give the "
            "encoding that it was trained with"
        )
    model.load_state_dict(found.weights, strict=False)
    return f"{file}: {len(found.taken)} tensors taken, {len(found.fresh)} left fresh"


def identity(classes: Any) -> dict[str, str]:
    """Return the classes for the header of a weights file; {} if they are unknown.

    Args:
        classes: a list of names; or for detection, a dict of names by category id.
    """
    if not classes:
        return {}
    if isinstance(classes, dict):
        return {"categories": json.dumps({str(key): name for key, name in classes.items()})}
    return {"classes": json.dumps(list(classes))}


def difference(
    file: dict[str, Any], data: dict[str, Any], sides: tuple[str, str] = ("before", "now")
) -> str | None:
    """Describe how the classes of a file or state differ from the data's; None if they do not."""
    for key in ("classes", "categories"):
        if key not in file or key not in data or file[key] == data[key]:
            continue
        before, now = (_numbered(about[key]) for about in (file, data))
        numbers = [number for number in {**before, **now} if before.get(number) != now.get(number)]
        shown = [
            f"{number}: {before.get(number, 'absent')!r} {sides[0]}, "
            f"{now.get(number, 'absent')!r} {sides[1]}"
            for number in numbers[:_SHOWN]
        ]
        more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
        old, new = set(before.values()), set(now.values())
        sets = [
            f"{what}: {', '.join(sorted(names)[:_SHOWN])}"
            for what, names in zip(
                (f"only {side}" for side in sides), (old - new, new - old), strict=True
            )
            if names
        ]
        return f"class {', '.join(shown)}{more}" + (f" ({'; '.join(sets)})" if sets else "")
    return None


def check_same_classes(train: Any, held_out: Any) -> None:
    """Raise if two splits number their classes differently; for arguments see :func:`identity`."""
    differing = difference(identity(train), identity(held_out), ("in training", "held out"))
    if differing is not None:
        raise UserError(
            f"the training and the held-out data have different classes: {differing}; "
            "data.class_map can set the numbers of folders"
        )


def _numbered(text: str) -> dict[str, str]:
    try:
        found = json.loads(text)
    except ValueError:
        return {"?": text[:60]}
    pairs = found.items() if isinstance(found, dict) else enumerate(found)
    return {str(number): str(name) for number, name in pairs}
