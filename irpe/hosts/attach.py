"""``attach`` and ``detach``: add encodings to the attention modules of a model, and remove them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from importlib import import_module

from torch import nn

from ..backends import check_backend
from ..encodings import parse, specs
from ..errors import IrpeError
from ..spec import Spec
from .base import Site, find_sites, register_host
from .config import remember_specs


@dataclass(frozen=True, slots=True)
class Report:
    """The changes of ``attach``.

    Args:
        specs: path of each attention module that was changed, and its spec.
        parameters: number of parameters added.
        keys: their names in the state_dict.
        native: the argument ``native`` of ``attach``.
    """

    specs: dict[str, str]
    parameters: int
    keys: tuple[str, ...]
    native: str = "keep"

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the attention modules that were changed."""
        return tuple(self.specs)

    def __str__(self) -> str:
        by_spec: dict[str, list[str]] = {}
        if self.native == "fuse":
            what = "; ".join(sorted({spec for spec in self.specs.values() if spec}))
            return (
                f"native encodings of {len(self.specs)} attention modules fused"
                + (f", with {what}, {self.parameters:,} parameters added" if what else "")
                + "; outputs stay the same to rounding"
                + (" where that is neutral" if what else "")
            )
        for path, spec in self.specs.items():
            by_spec.setdefault(spec, []).append(path or "the model itself")
        lines = []
        for spec, paths in by_spec.items():
            names = paths[0] if len(paths) == 1 else f"{paths[0]} ... {paths[-1]}"
            lines.append(f"{spec} on {len(paths)} attention modules ({names})")
        same = self.native == "keep" and all(parse(spec).neutral for spec in by_spec)
        return f"{'; '.join(lines)}, {self.parameters:,} parameters added; outputs " + (
            "stay the same until trained" if same else "change at once: train the model"
        )


def attach(
    model: nn.Module,
    spec: str | Spec | Mapping[str, str | Spec] | None = None,
    *,
    where: str = "*",
    backend: str = "auto",
    native: str = "keep",
) -> Report:
    """Add encodings to the attention modules of a model, in place.

    Tables are initialised so that outputs stay the same, to rounding, until you train them. Rotary
    embeddings, ALiBi and other encodings without such tables change outputs at once; the report
    states which. Keys of the state_dict are unchanged, and new ones are added. Image models compute
    positions from their own patch embedding at every forward pass. For ``nn.MultiheadAttention``
    and timm's blocks in your own model, set positions with ``with irpe.located(grid):``. Call
    ``attach`` inside it too if there are prefix tokens.

    Create optimisers and averaged copies of the model after ``attach``: earlier ones do not have
    the new parameters.

    Args:
        model: a vision transformer of timm or torchvision, an image encoder of transformers, an
            ``nn.MultiheadAttention`` (``nn.TransformerEncoder``), a model of a registered library
            (``irpe.register_host``), or any module that contains some of these.
        spec: the encoding, as ``"rpe-2.0-product-ctx-1-k"``; several for one module as
            ``"rope-axial + rpe-1.9-product-bias-1-k"``; or a mapping of shell patterns to specs:
            each module gets the spec of the first pattern that matches its path; a module that
            matches none is unchanged. None, with ``native="fuse"``: only the native encodings.
        where: a shell pattern for the paths of the attention modules, as ``"blocks.[0-5].*"``.
        backend: see ``irpe.attention``.
        native: how to treat a module's native rotary embedding or relative bias. "keep": the
            encoding is added to it. "replace": the encoding replaces it, which changes outputs at
            once; its parameters are frozen and stay in the model for ``detach``. "fuse": it is
            computed as terms of ``irpe.attention`` from its own parameters, without materialising
            ``[H, L, L]``; outputs and the state_dict stay the same. docs/support.md lists the
            models that support it.

    Returns:
        The changes; print it.

    Raises:
        IrpeError: if a pattern matches nothing, or a module has an encoding already or is not
            supported. The model is then unchanged.
    """
    check_backend(backend)
    if native not in ("keep", "replace", "fuse"):
        raise IrpeError(f"native={native!r} is not one of keep, replace, fuse")
    if not isinstance(where, str):
        raise IrpeError(f"where={where!r} is not a shell pattern, as 'blocks.[0-5].*'")
    patterns: dict[str, Spec | None]
    if spec is None and native != "fuse":
        raise IrpeError("spec=None: attach needs an encoding, such as rpe-1.9-product-ctx-1-k")
    if not isinstance(spec, Mapping):
        patterns = {where: None if spec is None else parse(spec)}
    elif where != "*":
        raise IrpeError(f"where={where!r} and a mapping of patterns to specs: give one of them")
    elif not spec:
        raise IrpeError("the mapping of patterns to specs is empty")
    else:
        patterns = {str(pattern): parse(one) for pattern, one in spec.items()}
    chosen = _choose(model, patterns, "pattern " if isinstance(spec, Mapping) else "where=")
    for site, one in chosen:
        name = site.name or type(model).__name__
        if site.attached:
            own = specs(site.module).get("")
            both = "" if None in (own, one) else f", '{own} + {one}'"
            raise IrpeError(
                f"{name} has an encoding already: irpe.detach(model) removes it; to put several "
                f"on one module, attach their sum{both}"
            )
        why = None if one is None else site.unsupported(one)
        if why is not None:
            raise IrpeError(f"attach does not support {name}: {why}")
        why = site.unfused(one) if native == "fuse" else None
        if why is not None:
            raise IrpeError(f"native='fuse' does not support {name}: {why}")
        if native == "replace" and site.native() is None:
            raise IrpeError(
                f"native='replace', but {name} has no native rotary embedding or relative bias: "
                "leave native='keep'"
            )
    before = {name for name, _ in model.named_parameters()}
    for site, one in chosen:
        site.add(one, backend=backend, native=native)
    added = {n: p.numel() for n, p in model.named_parameters() if n not in before}
    remember_specs(model)
    changed = {site.name: "" if one is None else str(one) for site, one in chosen}
    return Report(changed, sum(added.values()), tuple(added), native)


def _choose(
    model: nn.Module, patterns: Mapping[str, Spec | None], say: str
) -> list[tuple[Site, Spec | None]]:
    """Return the sites whose path matches a pattern, each with its spec."""
    sites = find_sites(model)
    if not sites:
        raise IrpeError(
            f"{type(model).__name__} has no attention that attach supports: it supports vision "
            "transformers of timm and torchvision, image encoders of transformers, and torch's "
            "nn.MultiheadAttention; for your own model, use irpe.RPEAttention"
        )
    fitting = ((site, [p for p in patterns if fnmatchcase(site.name, p)]) for site in sites)
    chosen = [(site, found[0]) for site, found in fitting if found]
    used = {pattern for _, pattern in chosen}
    for pattern in patterns:
        if pattern not in used:
            names = ", ".join(site.name for site in sites[:3])
            raise IrpeError(
                f"{say}{pattern!r} matches none of the attention modules ({names}, ...)"
            )
    return [(site, patterns[pattern]) for site, pattern in chosen]


def detach(model: nn.Module) -> None:
    """Undo ``attach``: remove the encodings and restore every module exactly.

    Raises:
        IrpeError: if nothing is attached.
    """
    attached = [site for site in find_sites(model) if site.attached]
    if not attached:
        raise IrpeError(f"nothing is attached to this {type(model).__name__}")
    for site in attached:
        site.remove()
    remember_specs(model)


def _find_built_in(file: str, model: nn.Module) -> Iterator[Site]:
    found: Iterator[Site] = import_module(f".{file}", __package__).find_sites(model)
    return found


for _library, _file in (
    ("torch", "torch"),
    ("transformers.modeling_utils", "transformers"),
    ("torchvision.models.vision_transformer", "torchvision"),
    ("timm", "timm.sites"),
):
    register_host(_library, partial(_find_built_in, _file))
