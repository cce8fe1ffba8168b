"""A place where a model can be equipped: what every host describes its attention modules by."""

from abc import ABC, abstractmethod

from torch import nn

from ..spec import RPE


class Site(ABC):
    """One attention module of a host model.

    Args:
        name: its path in the model that was handed to ``attach``.
        module: the attention module.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module

    @property
    @abstractmethod
    def equipped(self) -> bool:
        """Whether an encoding is attached already."""

    @abstractmethod
    def obstacle(self, spec: RPE) -> str | None:
        """Why the module cannot take the encoding; None if it can."""

    @abstractmethod
    def equip(self, spec: RPE, backend: str) -> None:
        """Attach the encoding, in place."""

    @abstractmethod
    def strip(self) -> None:
        """Undo ``equip``, exactly."""
