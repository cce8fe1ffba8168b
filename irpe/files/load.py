"""``irpe.load``."""

import json
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..encodings import parse, specs
from ..errors import IrpeError
from ..geometry import Grid
from ..hosts import attach, located
from ..hosts.base import find_sites
from ..hosts.config import is_pretrained, remember_specs
from .fit import Fit, differences, fit, lost_tables, parts_of
from .pretrained import aligned, read_pretrained
from .read import Checkpoint, read_checkpoint, read_json
from .ropevit import in_timms_names
from .save import unwrapped

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Loaded:
    """The result of ``irpe.load``.

    Args:
        file: the path that was loaded.
        attached: the specs that ``irpe.load`` attached, by path.
        taken: names loaded unmodified.
        resized: absolute embeddings loaded at another size.
        fresh: names that keep the model's values.
        ignored: names that only the file has.
    """

    file: str
    attached: dict[str, str]
    taken: tuple[str, ...]
    resized: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{len(self.taken)} tensors taken"]
        for names, what in (
            (self.resized, "resized"),
            (self.fresh, "left fresh"),
            (self.ignored, "ignored"),
        ):
            if names:
                parts.append(f"{len(names)} {what} ({_first(names)})")
        if self.attached:
            kinds = ", ".join(sorted(set(self.attached.values())))
            parts.append(f"attached {kinds} to {len(self.attached)} modules")
        return f"{self.file}: {', '.join(parts)}"


def load(model: nn.Module, file: str | Path, *, differ: str | Iterable[str] = ()) -> Loaded:
    """Attach the encodings of a file, then load its weights strictly.

    Args:
        model: a model without encodings, or with those of the file.
        file: a file of ``irpe.save`` or ``train_*.py``; a state dict of ``torch.save``, also under
            ``model``, ``state_dict`` or ``model_ema``; a folder of transformers'
            ``save_pretrained``, of timm's ``save_for_hf`` or of a run (its best weights); an index
            of shards.
        differ: for fine-tuning, the parts that may differ, as ``"head, positions"`` or
            ``("head", "positions")``. ``"head"``: a classifier of another shape keeps the model's
            values. ``"positions"``: the model's library resizes absolute embeddings of another
            size. ``"tables"``: nothing is attached; tables of the same encoding are loaded, and
            other tables keep the model's values.

    Returns:
        The names that were loaded, resized, left fresh and ignored; print it.

    Raises:
        IrpeError: if other names or shapes differ, the file has tables without a spec or a spec
            without tables, or its spec is not the model's. The model is then unchanged.
    """
    if not isinstance(model, nn.Module) or not isinstance(file, str | Path):
        given = f"{type(model).__name__}, {type(file).__name__}"
        raise IrpeError(f"load takes a torch.nn.Module and the path of a file, not {given}")
    model, parts = unwrapped(model), parts_of(differ)
    if any(value.is_meta for value in model.state_dict().values()):
        raise IrpeError(
            f"this {type(model).__name__} is on the meta device: model.to_empty(device='cpu') first"
        )
    pretrained = is_pretrained(model) and (Path(file) / "config.json").is_file()
    held = read_pretrained(model, Path(file)) if pretrained else read_checkpoint(file)
    weights, told = _renamed(model, held.weights), held.specs
    weights = in_timms_names(weights, model.state_dict())
    own = specs(model)
    if told is not None and is_pretrained(model):
        told = aligned(model, told)
    if "tables" not in parts:
        told = _checked(model, file, held, weights, told, own)
    missing = {}
    if told is not None and "tables" not in parts:
        # A module in several places has an encoding under each of them in the file.
        places = dict(model.named_modules(remove_duplicate=False))
        again = places.keys() - dict(model.named_modules()).keys()
        missing = {p: spec for p, spec in told.items() if p not in own and p not in again}
        options = read_json(held.about.get("irpe_options", "{}"))
        if not isinstance(options, dict):
            raise IrpeError(f"{str(file)!r} is damaged: its irpe_options are not a JSON object")
        if "irpe" in held.about:
            _check_native(model, file, [path for path in told if path in own], options)
    before = {site.name for site in find_sites(model) if site.attached}
    try:
        if missing:
            _attach(model, file, missing, options)
        found = fit(model, weights, parts, _others(own, told), _image_size(held))
        if found.wrong:
            raise IrpeError(_message(file, found, told))
    except IrpeError:
        added = [s for s in find_sites(model) if s.attached and s.name not in before]
        for site in added:
            site.remove()
        if added:
            remember_specs(model)
        raise
    state = model.state_dict()
    model.load_state_dict({**{name: state[name] for name in found.fresh}, **found.weights})
    kept = map(tuple, (found.taken, found.resized, found.fresh, found.ignored))
    return Loaded(str(file), missing, *kept)


def _renamed(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefix ``model.`` of a wrapper that the model does not have."""
    if any(name.startswith("model.") for name in model.state_dict()):
        return weights
    if not all(name.startswith("model.") for name in weights):
        return aligned(model, weights) if is_pretrained(model) else weights
    return {name.removeprefix("model."): value for name, value in weights.items()}


def _checked(
    model: nn.Module,
    file: str | Path,
    held: Checkpoint,
    weights: Mapping[str, Tensor],
    told: dict[str, str] | None,
    own: dict[str, str],
) -> dict[str, str] | None:
    """Return the specs of the file, by path; raise if they contradict the model's."""
    if told is None:
        lost = lost_tables(weights, model.state_dict())
        if held.spec is None:
            if lost:
                raise IrpeError(
                    f"{str(file)!r} has tables ({_first(lost)}) without the spec of their "
                    "encoding: irpe.attach(model, spec) first, or ignore them with "
                    "differ='tables'"
                )
            return None
        owners = {name.rpartition(".rpe_")[0] for name in lost if ".rpe_" in name}
        return dict.fromkeys(sorted(owners), held.spec) or None
    for path in _others(own, told):
        raise IrpeError(
            f"{path or 'the model'} has {own[path]}, and {str(file)!r} has "
            f"{told.get(path, 'no encoding')} there: irpe.detach(model) first, or keep the model's "
            "with differ='tables'"
        )
    return told


def _check_native(
    model: nn.Module, file: str | Path, paths: Iterable[str], options: dict[str, Any]
) -> None:
    """Raise if a native encoding is replaced in the file and kept in the model, or vice versa."""
    modules = dict(model.named_modules())
    for path in paths:
        own = getattr(modules[path], "rpe_native", "keep")
        told = options.get(path, {}).get("native", "keep")
        if own != told and "replace" in (own, told):
            raise IrpeError(
                f"{path or 'the model'} has native={own!r}, and {str(file)!r} was saved with "
                f"native={told!r} there: irpe.detach(model) first"
            )


def _attach(
    model: nn.Module, file: str | Path, missing: dict[str, str], options: dict[str, Any]
) -> None:
    """Attach the specs with their options in the file."""
    modules = dict(model.named_modules())
    absent = [path for path in missing if path not in modules]
    if absent:
        raise IrpeError(
            f"{str(file)!r} has encodings on modules that this {type(model).__name__} does not "
            f"have: {_first(absent)}"
        )
    groups: dict[str, dict[str, str]] = {}
    for path, spec in missing.items():
        groups.setdefault(json.dumps(options.get(path, {}), sort_keys=True), {})[path] = spec
    try:
        for text, group in groups.items():
            given = json.loads(text)
            prefix = given.get("prefix", 0)
            with located(Grid(1, 1, prefix=prefix)) if prefix else nullcontext():
                attach(model, group, native=given.get("native", "keep"))
    except IrpeError as error:
        raise IrpeError(f"{str(file)!r} does not fit this model: {error}") from error


def _image_size(held: Checkpoint) -> tuple[int, int] | None:
    """Return the height and width of a timm model's images, if the file has them."""
    config = read_json(held.about.get("irpe_model", ""))
    size = (config.get("model_args") or {}).get("img_size") if isinstance(config, dict) else None
    return (size, size) if isinstance(size, int) else tuple(size) if size else None


def _others(own: dict[str, str], told: dict[str, str] | None) -> list[str]:
    """Return the paths with another encoding in the file than in the model."""
    if told is None:
        return []
    return [p for p, spec in own.items() if p not in told or parse(told[p]) != parse(spec)]


def _message(file: str | Path, found: Fit, told: dict[str, str] | None) -> str:
    missing = found.wrong.get("missing in the file", [])
    if missing and len(found.wrong) == 1 and found.needed == {"tables"}:
        says = "has the spec of an encoding but " if told else ""
        return (
            f"{str(file)!r} {says}lacks the tables of {len(missing)} names "
            f"({_first(missing)}): it was saved without them; differ='tables' leaves them fresh"
        )
    allowed = ", ".join(sorted(part for part in found.needed if part))
    hint = "" if None in found.needed else f"; differ={allowed!r} allows this"
    return f"{str(file)!r} does not fit this model ({differences(found.wrong)}){hint}"


def _first(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
