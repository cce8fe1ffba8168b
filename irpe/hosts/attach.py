"""``attach`` and ``detach``: equip a model that exists already, in place, and undo it."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module

from torch import nn

from ..errors import IrpeError
from ..functional import check_backend
from ..spec import Spec, parse
from .site import Site


@dataclass(frozen=True, slots=True)
class Report:
    """What ``attach`` changed.

    Args:
        spec: the encoding. modules: paths of the attention modules that carry it now.
        parameters: number of parameters added. keys: their names in the state_dict.
        own: whether the modules' own rotary embeddings and relative biases were kept.
    """

    spec: Spec
    modules: tuple[str, ...]
    parameters: int
    keys: tuple[str, ...]
    own: str = "keep"

    def __str__(self) -> str:
        names = self.modules[0]
        if len(self.modules) > 1:
            names += f" ... {self.modules[-1]}"
        same = self.spec.neutral and self.own == "keep"
        return (
            f"{self.spec} on {len(self.modules)} attention modules ({names}), "
            f"{self.parameters:,} parameters added; outputs "
            + ("stay the same until trained" if same else "change at once: train on")
        )


def attach(
    model: nn.Module,
    spec: str | Spec,
    where: str = "*",
    backend: str = "auto",
    own: str = "keep",
) -> Report:
    """Equip a model with an encoding, in place.

    Tables start so that outputs stay the same, to rounding, until they are trained; rotary
    embeddings, ALiBi and what else has no tables to start with change outputs at once, and the
    report says so. Keys of the state_dict stay as they are and new ones are added. Positions come
    from an image model's own patch embedding, anew in each forward pass; for
    ``nn.MultiheadAttention`` the caller tells them by ``with irpe.located(grid):``, around
    ``attach`` too where prefix tokens stand before the others.

    Args:
        model: a vision transformer of timm's or torchvision's, an image encoder of transformers
            or ``nn.MultiheadAttention`` (``nn.TransformerEncoder``), or any module that holds some;
            where a decoder does too, ``where`` chooses the encoder.
        spec: the encoding, as ``"rpe-2.0-product-ctx-1-k"`` or ``"rope-axial"``.
        where: a shell pattern for the paths of the attention modules, as ``"blocks.[0-5].*"``.
        backend: see ``irpe.attention``.
        own: what becomes of an attention module's own rotary embedding or relative bias: "keep"
            it, and the encoding is added; or "replace" it by the encoding, which changes outputs
            at once. Its parameters stay in the model, unused, for ``detach``.

    Returns:
        What was changed; print it.

    Raises:
        IrpeError: where nothing matches, a module is equipped already or cannot be. The model is
            not changed then.
    """
    spec = parse(spec)
    check_backend(backend)
    if own not in ("keep", "replace"):
        raise IrpeError(f"own={own!r} is not one of keep, replace")
    if not isinstance(where, str):
        raise IrpeError(f"where={where!r} is a shell pattern, as 'blocks.[0-5].*'")
    sites = _sites(model)
    if not sites:
        raise IrpeError(
            f"{type(model).__name__} has no attention that can be equipped: "
            "attach knows vision transformers of timm and torchvision, image encoders of "
            "transformers, and torch's nn.MultiheadAttention; "
            "for a model of your own, use irpe.RPEAttention"
        )
    chosen = [site for site in sites if fnmatchcase(site.name, where)]
    if not chosen:
        names = ", ".join(site.name for site in sites[:3])
        raise IrpeError(f"where={where!r} matches none of the attention modules ({names}, ...)")
    for site in chosen:
        name = site.name or type(model).__name__
        if site.equipped:
            raise IrpeError(f"{name} is equipped already: irpe.detach(model) undoes that")
        obstacle = site.obstacle(spec)
        if obstacle is not None:
            raise IrpeError(f"{name} cannot be equipped: {obstacle}")
        if own == "replace" and site.possession() is None:
            raise IrpeError(
                f"own='replace', but {name} has no rotary embedding or relative bias of its "
                "own: leave own='keep'"
            )
        site.own = own
    before = {name for name, _ in model.named_parameters()}
    for site in chosen:
        site.equip(spec, backend)
    added = {n: p.numel() for n, p in model.named_parameters() if n not in before}
    return Report(spec, tuple(s.name for s in chosen), sum(added.values()), tuple(added), own)


def detach(model: nn.Module) -> None:
    """Undo ``attach``: remove the tables and give every module its own forward pass back.

    Raises:
        IrpeError: where nothing is attached.
    """
    equipped = [site for site in _sites(model) if site.equipped]
    if not equipped:
        raise IrpeError(f"nothing is attached to this {type(model).__name__}")
    for site in equipped:
        if site.equipped:  # not stripped together with another one
            site.strip()


# A library's module, which is imported where a model may hold something of that library's, and its
# host here; the first that knows an attention module has it.
_HOSTS = {
    "timm": "timm",
    "torchvision.models.vision_transformer": "torchvision",
    "transformers.modeling_utils": "transformers",
    "torch": "mha",
}


def _sites(model: nn.Module) -> list[Site]:
    if not isinstance(model, nn.Module):
        raise IrpeError(f"a model is a torch.nn.Module, not {type(model).__name__}")
    return list(_find(model))


def _find(model: nn.Module) -> Iterator[Site]:
    known: set[int] = set()
    for library, host in _HOSTS.items():
        if library in sys.modules:
            sites = import_module(f".{host}", __package__).sites(model)
            found = [site for site in sites if id(site.module) not in known]
            known |= {id(site.module) for site in found}
            yield from found
