"""The interface of a library to ``attach``: sites, and a function that finds them in a model."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..encodings import Encoding, build
from ..errors import IrpeError
from ..spec import Spec

_IMAGE = ("rpe_q", "rpe_k", "rpe_v")  # every attached module has these attributes; some are None


class Site:
    """One attention module that ``attach`` can add encodings to. Subclass it for your own library.

    ``kind``: the class that the module gets, whose forward pass runs the encodings; None: the
    module keeps its class. ``axes``: 3 for videos, 2 for images, 1 for texts, None for any.

    Args:
        name: path of the module in the model.
        module: the attention module.
    """

    kind: type[nn.Module] | None = None
    axes: int | None = None

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module: Any = module

    def sizes(self) -> dict[str, Any]:
        """Return the arguments dim, num_heads, head_dim and prefix (a number) of ``irpe.build``."""
        raise NotImplementedError

    @property
    def attached(self) -> bool:
        """Whether the module has an encoding attached."""
        return "rpe_backend" in self.module.__dict__ or any(
            isinstance(child, Encoding) for child in self.module.children()
        )

    def unfused(self, spec: Spec | None) -> str | None:
        """Return why the native encoding cannot be fused, with ``spec`` added; None if it can."""
        return "it has no native encoding that can be fused"

    def unsupported(self, spec: Spec) -> str | None:
        """Return why the module cannot have this encoding; None if it can. Changes nothing."""
        if spec.at_input:
            return f"{spec} is added to the tokens at a model's input, and not in its attention"
        if self.axes in (2, 3) and self.axes not in spec.axes:
            axes = ", ".join(("one axis", "two axes", "three axes")[n - 1] for n in spec.axes)
            what = ("an image's are (row, column)", "a video's are (frame, row, column)")
            return f"{spec} is for positions on {axes}, and {what[self.axes - 2]}"
        if self.axes == 1 and 1 not in spec.axes:
            return f"{spec} is for positions on two axes, and a text's are on one"
        try:
            build(spec, **self.sizes(), device="meta")
        except IrpeError as error:  # for example an unsupported head dim
            return str(error)
        return None

    def native(self) -> str | None:
        """Return the name of the module's native position encoding ("relative bias"), or None."""
        return None

    def weight(self) -> Tensor:
        """Return a parameter; the tables get its device and dtype."""
        # A fully quantised module has no parameters; it runs on a CPU, in float32.
        made = (p for p in self.module.parameters() if p.is_floating_point())
        return next(made, torch.empty(0, device="cpu", dtype=torch.float32))

    def add(self, spec: Spec | None, *, backend: str, native: str) -> None:
        """Attach the encoding, in place.

        Args:
            spec: a supported one, see ``unsupported``; None to only fuse.
            backend: see ``irpe.attention``.
            native: "keep"; "replace", only where ``native()`` is not None; or "fuse", only where
                ``unfused()`` is None.
        """
        module, like = self.module, self.weight()
        made: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        encodings = {} if spec is None else build(spec, **self.sizes(), **made)
        for name, encoding in [*dict.fromkeys(_IMAGE).items(), *encodings.items()]:
            setattr(module, name, encoding)
        module.__dict__.update(rpe_backend=backend, rpe_native=native)
        if self.kind is not None:
            change_class(module, self.kind)

    def remove(self) -> None:
        """Undo ``add`` exactly; later parametrisations stay."""
        module = self.module
        added = [name for name, child in module.named_children() if isinstance(child, Encoding)]
        for name in (*added, *(n for n in _IMAGE if n in module.__dict__)):
            delattr(module, name)
        unfreeze(module)
        restore_class(module)
        for name in ("rpe_backend", "rpe_native"):
            del module.__dict__[name]


FindSites = Callable[[nn.Module], Iterable[Site]]
_LIBRARIES: list[tuple[str, FindSites]] = []


def register_host(library: str, find_sites: FindSites) -> None:
    """Register a library, so that ``attach`` finds its attention modules.

    Args:
        library: its module, as "timm". ``find_sites`` is called only if that module is imported.
        find_sites: returns the sites of a model: all its attention modules, the unsupported ones
            too. If several libraries find a module, the one registered last is used.

    Raises:
        IrpeError: if the arguments are not a string and a function.
    """
    if not isinstance(library, str) or not callable(find_sites):
        raise IrpeError(
            f"register_host takes a module name and a function, not {library!r}, {find_sites!r}"
        )
    _LIBRARIES.insert(0, (library, find_sites))


def find_sites(model: nn.Module) -> list[Site]:
    """Return the attention modules of a model that a registered library finds."""
    if not isinstance(model, nn.Module):
        raise IrpeError(f"a model is a torch.nn.Module, not {type(model).__name__}")
    found: dict[int, Site] = {}
    for library, find in _LIBRARIES:
        if library in sys.modules:
            for site in find(model):
                found.setdefault(id(site.module), site)
    return list(found.values())


def rotates(spec: Spec | None) -> bool:
    """Return whether an encoding rotates queries and keys."""
    return spec is not None and any("rope" in str(part) for part in spec.parts)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module before ``attach`` and parametrisations."""
    kind: type[nn.Module] = parametrize.type_before_parametrizations(module)
    return module.__dict__.get("rpe_plain", kind)


def change_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change the class of a module; ``restore_class`` undoes it."""
    module.__dict__["rpe_plain"] = plain_class(module)
    _set_class(module, kind)


def restore_class(module: nn.Module) -> None:
    """Undo ``change_class``, if it was called."""
    kind = module.__dict__.pop("rpe_plain", None)
    if kind is not None:
        _set_class(module, kind)


def _set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    if parametrize.is_parametrized(module):
        # Copies of the module share its parametrised class, so make a new one.
        given = type(module)
        members = {k: v for k, v in vars(given).items() if k not in ("__dict__", "__weakref__")}
        kind = type(given.__name__, (kind,), members)
    module.__class__ = kind


def freeze(owner: nn.Module, names: Iterable[str]) -> None:
    """Freeze the parameters under these attributes, which the forward pass no longer uses."""
    frozen = owner.__dict__.setdefault("rpe_frozen", [])
    for path, parameter in owner.named_parameters():
        if path.partition(".")[0] in names and parameter.requires_grad:
            parameter.requires_grad_(False)
            frozen.append(path)


def unfreeze(owner: nn.Module) -> None:
    """Undo ``freeze``."""
    frozen = owner.__dict__.pop("rpe_frozen", ())
    for path, parameter in owner.named_parameters():
        if path in frozen:
            parameter.requires_grad_(True)
