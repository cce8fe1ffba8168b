"""Compare the weights of a file with a model, and decide which to load, resize or ignore."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..encodings import Encoding
from ..errors import IrpeError
from .resize import resized_positions

PARTS = ("head", "positions", "tables")
_SHOWN = 3
# Attribute names of the built-in encodings, to recognise tables without a module in the model.
_TABLE = re.compile(r"(^|\.)(rpe_[qkv]|rope|alibi|t5|shaw|huang|pia|sinusoidal|learned)\.")
# Absolute embeddings, and native relative biases whose size depends on the image size.
_POSITION = re.compile(r"(^|[._])pos(ition)?([._]|$)")
# Attribute names of classifiers, for models without get_classifier.
_HEADS = {"head", "head_dist", "heads", "fc", "classifier", "class_embed", "pooler"}
_HEADS |= {"cls_classifier", "distillation_classifier", "class_labels_classifier"}


@dataclass(slots=True)
class Fit:
    """The decision for each name in the file and in the model.

    Args:
        weights: the tensors to load.
        taken: names loaded unmodified.
        resized: names loaded at another size.
        fresh: names that keep the model's values.
        ignored: names that only the file has.
        wrong: names that do not match, by reason.
        needed: the parts of the names in ``wrong``; contains None if a name has no part.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    taken: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    wrong: dict[str, list[str]] = field(default_factory=dict)
    needed: set[str | None] = field(default_factory=set)


def parts_of(differ: str | Iterable[str]) -> frozenset[str]:
    """Return the parts in ``differ``: ``"head, tables"`` or ``("head", "tables")``."""
    if not isinstance(differ, Iterable):
        raise IrpeError(f"differ={differ!r} is not a list of {', '.join(PARTS)}")
    names = differ.replace(",", " ").split() if isinstance(differ, str) else list(differ)
    for name in names:
        if name not in PARTS:
            raise IrpeError(f"differ={differ!r}: {name!r} is not one of {', '.join(PARTS)}")
    return frozenset(names)


def table_names(model: nn.Module) -> dict[str, str]:
    """Return the names of all tables of a model, each with the path of its attention module."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Encoding):
            owner = path.rpartition(".")[0]
            found.update({f"{path}.{name}": owner for name in module.state_dict()})
    return found


def lost_tables(weights: Iterable[str], own: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tables of encodings that are not in the model's state dict ``own``."""
    return [name for name in weights if name not in own and _TABLE.search(name)]


def fit(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    parts: frozenset[str] = frozenset(),
    others: Collection[str] = (),
    size: tuple[int, int] | None = None,
) -> Fit:
    """Compare weights with those of a model.

    Args:
        model: the model.
        weights: the weights of a file.
        parts: the parts that may differ, see ``irpe.load``.
        others: paths of attention modules with another encoding in the file.
        size: height and width of the file's images in pixels, if known.
    """
    own = model.state_dict()
    kinds = _Kinds(model, own)
    found = Fit()
    reasons = {name: _reason(weights.get(name), value) for name, value in own.items()}
    for name, owner in kinds.tables.items():
        if owner in others:
            reasons[name] = "of another encoding"
    # Weight and bias of a classifier are loaded together or not at all.
    broken = {name.rpartition(".")[0] for name in own if reasons[name] and kinds.head(name)}
    moved = [name for name in own if reasons[name] == "of another shape" and kinds.position(name)]
    sizes = resized_positions(model, weights, moved, size) if "positions" in parts and moved else {}
    for name, reason in reasons.items():
        part = kinds.part(name)
        if "head" in parts and name.rpartition(".")[0] in broken:
            found.fresh.append(name)
        elif reason is None:
            found.weights[name] = weights[name]
            found.taken.append(name)
        elif name in sizes:
            found.weights[name] = sizes[name]
            found.resized.append(name)
        elif part in parts and not (part == "positions" and name in weights):
            found.fresh.append(name)
        else:
            found.wrong.setdefault(reason, []).append(_described(name, reason, weights, own))
            found.needed.add(part)
    for name in weights:
        if name not in own:
            part = kinds.part(name)
            if part in parts:
                found.ignored.append(name)
            else:
                found.wrong.setdefault("unknown to the model", []).append(name)
                found.needed.add(part)
    return found


def differences(wrong: Mapping[str, list[str]], shown: int = _SHOWN) -> str:
    """Return the number of names and the first names of each kind of difference, as text."""
    texts = []
    for reason, names in wrong.items():
        more = f" and {len(names) - shown} more" if len(names) > shown else ""
        texts.append(f"{len(names)} {reason}: {', '.join(names[:shown])}{more}")
    return "; ".join(texts)


class _Kinds:
    """The part of a model that each name belongs to."""

    def __init__(self, model: nn.Module, own: Mapping[str, Tensor]) -> None:
        self.tables = table_names(model)
        self.own = own
        heads = set()
        for module in model.modules():
            listed = getattr(module, "get_classifier", None)
            given = listed() if callable(listed) else ()
            given = given if isinstance(given, list | tuple) else (given,)
            for one in given:
                heads |= {name for name, other in model.named_modules() if other is one}
        self.heads = tuple(f"{name}." for name in (*heads, *_HEADS) if name)

    def head(self, name: str) -> bool:
        return name.startswith(self.heads)

    def position(self, name: str) -> bool:
        return name not in self.tables and bool(_POSITION.search(name))

    def part(self, name: str) -> str | None:
        if name in self.tables or (name not in self.own and _TABLE.search(name)):
            return "tables"
        if self.head(name):
            return "head"
        return "positions" if self.position(name) else None


def _reason(given: Tensor | None, own: Tensor) -> str | None:
    if given is None:
        return "missing in the file"
    if given.shape != own.shape:
        return "of another shape"
    # Other floating point dtypes are converted.
    return None if given.is_floating_point() == own.is_floating_point() else "of another kind"


def _described(
    name: str, reason: str, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> str:
    if reason not in ("of another shape", "of another kind"):
        return name
    theirs, ours = weights[name], own[name]
    differs = theirs.shape != ours.shape
    file, model = ((list(t.shape) if differs else t.dtype) for t in (theirs, ours))
    return f"{name} {file} in the file, {model} in the model"
