"""The geometries of a model's last few sizes."""

from collections import OrderedDict
from typing import Generic, TypeVar

import torch

import irpe

Kind = TypeVar("Kind", bound=irpe.Geometry)


class Recent(Generic[Kind]):
    """Geometries by their sizes: those that come again keep their bucket ids.

    Args:
        kind: called with sizes, as ``irpe.Grid`` with height and width.
    """

    KEPT = 8

    def __init__(self, kind: type[Kind]) -> None:
        self.kind = kind
        self._kept: OrderedDict[tuple[int, ...], Kind] = OrderedDict()

    def of(self, *sizes: int) -> Kind:
        """The geometry of some sizes, made anew where a graph is recorded."""
        recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if recorded or not all(isinstance(size, int) for size in sizes):
            return self.kind(*sizes)
        geometry = self._kept.pop(sizes, None) or self.kind(*sizes)
        self._kept[sizes] = geometry
        if len(self._kept) > self.KEPT:
            self._kept.popitem(last=False)
        return geometry

    def __deepcopy__(self, memo: object) -> "Recent[Kind]":
        return Recent(self.kind)

    def __reduce__(self) -> tuple[type["Recent[Kind]"], tuple[type[Kind]]]:
        return Recent, (self.kind,)
