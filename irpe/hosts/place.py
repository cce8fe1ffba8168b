"""How a layer learns where its tokens are, where the host's own arguments cannot tell it.

The caller says it around the model (``located``), or a patch projection tells it: a hook leaves the
grid of its output in a slot, and the layers, when they are gone through, are handed out with that
grid bound to them. So two forward passes before one backward pass each keep their own.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..errors import IrpeError
from ..geometry import Geometry, Grid


class _Place(threading.local):
    def __init__(self) -> None:
        self.geometry: Geometry | None = None


_PLACE = _Place()


@contextmanager
def located(geometry: Geometry) -> Iterator[None]:
    """Say where the tokens are, for attached ``nn.MultiheadAttention`` modules called inside.

    ``irpe.attach`` inside gives tables a bucket for prefix tokens if the geometry has some.

    Args:
        geometry: as ``irpe.Grid(25, 34)``; one for all modules and images of the batch. A backward
            pass that recomputes (gradient checkpointing) belongs inside too.
    """
    if not isinstance(geometry, Geometry):
        raise IrpeError(f"geometry={geometry!r} is not a geometry: make an irpe.Grid")
    before, _PLACE.geometry = _PLACE.geometry, geometry
    try:
        yield
    finally:
        _PLACE.geometry = before


def here() -> Geometry | None:
    """What the innermost ``located`` says."""
    return _PLACE.geometry


class Slot(threading.local):
    """Carries a geometry from the patch embedding to the layers of the same forward pass."""

    geometry: Geometry | None = None

    def take(self) -> Geometry | None:
        geometry, self.geometry = self.geometry, None
        return geometry

    def keep(self, kept: Tensor | None) -> None:
        """Only the patches ``kept``, int64 ``[B, L']``, go on."""
        geometry = self.geometry
        if kept is None or geometry is None:
            return
        if isinstance(geometry, Grid):
            self.geometry = geometry.select(kept)
            return
        places, _ = geometry.positions(kept.device)
        places = places.gather(1, kept.unsqueeze(-1).expand(-1, -1, places.shape[-1]))
        self.geometry = Geometry(places, prefix=geometry.prefix)

    def __reduce__(self) -> tuple[type["Slot"], tuple[()]]:
        return Slot, ()


class ReadGrid:
    """Forward hook of a patch projection: the grid of its output, ``[B, C, rows, columns]``."""

    def __init__(self, slot: Slot, prefix: int) -> None:
        self.slot, self.prefix = slot, prefix

    def __call__(self, projection: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        height, width = output.shape[-2:]
        self.slot.geometry = Grid(height, width, self.prefix)


def unhook(module: nn.Module, kind: type) -> None:
    """Take the forward hooks of a kind off."""
    for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, kind)]:
        del module._forward_hooks[key]
        module._forward_hooks_with_kwargs.pop(key, None)


class BoundLayer:
    """A layer with the grid of one forward pass; all else is the layer's."""

    def __init__(self, layer: nn.Module, geometry: Geometry) -> None:
        self._layer, self._geometry = layer, geometry

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with located(self._geometry):
            return self._layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_layer":  # a compiler looks at one that holds nothing yet
            raise AttributeError(name)
        return getattr(self._layer, name)


class Binds(nn.Module):
    """A container that hands out its layers bound, if the patch projection has just run."""

    slot: Slot

    def bind(self, layer: nn.Module, geometry: Geometry) -> Any:
        return BoundLayer(layer, geometry)

    def _bound(self) -> list[Any]:
        layers: list[Any] = list(self._modules.values())
        geometry = self.slot.take()
        return layers if geometry is None else [self.bind(layer, geometry) for layer in layers]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._bound())

    def children(self) -> Iterator[Any]:  # what torch's checkpoint_sequential goes through
        return iter(self._bound())

    def __getitem__(self, index: Any) -> Any:
        item = super().__getitem__(index)  # type: ignore[misc]
        if isinstance(item, Binds):  # a slice goes on where this one stands
            held = {name: value for name, value in vars(self).items() if name not in vars(item)}
            vars(item).update(held)
        return item


class LocatedSequential(Binds, nn.Sequential):
    """An ``nn.Sequential`` of layers."""


class LocatedList(Binds, nn.ModuleList):
    """An ``nn.ModuleList`` of layers."""


_KINDS: dict[type, type] = {nn.Sequential: LocatedSequential, nn.ModuleList: LocatedList}


def locate(projection: nn.Module, layers: nn.Module, prefix: int) -> None:
    """From here on the projection tells the layers the grid. Does nothing a second time."""
    if isinstance(layers, Binds):
        return
    slot = Slot()
    layers.__class__ = _KINDS[type(layers)]
    layers.slot = slot  # type: ignore[assignment]
    projection.register_forward_hook(ReadGrid(slot, prefix))


def forget(projection: nn.Module, layers: nn.Module) -> None:
    """Undo ``locate``."""
    layers.__class__ = {new: old for old, new in _KINDS.items()}[type(layers)]
    del layers.slot
    unhook(projection, ReadGrid)


def placeable(layers: nn.Module) -> bool:
    """Whether ``locate`` knows the container."""
    return type(layers) in _KINDS or isinstance(layers, Binds)
