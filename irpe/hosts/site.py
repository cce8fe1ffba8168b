"""A place where a model can be equipped: what every host describes its attention modules by."""

from abc import ABC, abstractmethod

from torch import nn

from ..encodings import Encoding
from ..spec import Spec


class Site(ABC):
    """One attention module of a host model.

    Args:
        name: its path in the model that was handed to ``attach``.
        module: the attention module.

    ``own``: "keep", or "replace" what it has itself to tell positions by.
    """

    own: str = "keep"

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module

    @property
    @abstractmethod
    def equipped(self) -> bool:
        """Whether an encoding is attached already."""

    def possession(self) -> str | None:
        """What the module has itself to tell positions by, as a relative bias."""
        return None

    @abstractmethod
    def obstacle(self, spec: Spec) -> str | None:
        """Why the module cannot take the encoding; None if it can."""

    @abstractmethod
    def equip(self, spec: Spec, backend: str) -> None:
        """Attach the encoding, in place."""

    @abstractmethod
    def strip(self) -> None:
        """Undo ``equip``, exactly."""


_IMAGE = ("rpe_q", "rpe_k", "rpe_v")


def put_on(module: nn.Module, encodings: dict[str, Encoding]) -> None:
    """Make encodings attributes of a module; those of images that it lacks are None."""
    for name in _IMAGE:
        setattr(module, name, None)
    for name, encoding in encodings.items():
        setattr(module, name, encoding)


def take_off(module: nn.Module) -> None:
    """Undo ``put_on``."""
    carried = [name for name, child in module.named_children() if isinstance(child, Encoding)]
    for name in (*carried, *(n for n in _IMAGE if n in module.__dict__)):
        delattr(module, name)


def misplaced(spec: Spec) -> str | None:
    """Why no attention module can carry an encoding; None if one can."""
    if spec.at_input:
        return f"{spec} is added to the tokens at a model's input, and not in its attention"
    return None


def misplaced_on_image(spec: Spec) -> str | None:
    """The same for the attention modules of an image model."""
    if 2 not in spec.axes and not spec.at_input:
        return f"{spec} is for positions on one axis, and an image's are (row, column)"
    return misplaced(spec)
