"""Axial rotary embedding of images and videos: each axis rotates part of the channels.

::

    rope-axial
    rope-axial,order=xy
    rope-axial,layout=half,coords=separate,rescale=2

Images: half of the channels by rows, half by columns. Videos: a third each by frames, rows and
columns; the remaining channels are not rotated.

With ``coords`` other than ``patches``, positions are patch centres in [-1, 1], as in DINOv3, and
frequencies are multiplied by 2 pi. In training mode, ``shift``, ``jitter`` and ``rescale`` move
them at random, in the same way in all layers that get the same geometry::

    c = ((2 (p + 1/2) / n - 1) + s) j r      s in [-shift, shift] and ln j in +-ln jitter by axis,
                                             ln r in +-ln rescale for all

Source: Heo et al., Rotary Position Embedding for Vision Transformer, ECCV 2024, Eq. 6; Siméoni et
al., DINOv3, 2025, arXiv 2508.10104, section 3.2.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import IrpeError
from ..fields import choice, number
from ..geometry import Geometry, Patches
from ..spec import LayerSize, Spec
from .base import Encoding, register
from .rotation import LAYOUTS, Rotary, powers


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class RopeAxial(Spec):
    """Rotations by each axis, of part of the channels (Heo et al., ECCV 2024).

    Args:
        layout: see ``Rope``.
        base: base of the frequencies base ** (-4t / D); for videos base ** (-t / (D // 6)).
        order: order of the parts: ``yx`` ((frames,) rows, columns, as in timm) or ``xy`` (columns,
            rows (, frames), as in the authors' code).
        coords: the positions: ``patches`` (integers), or patch centres in [-1, 1], divided by the
            length of each side (``separate``), the longest (``max``) or the shortest side
            (``min``).
        shift: largest random shift of an axis in a training step.
        jitter: largest random factor of an axis in a training step, at least 1.
        rescale: largest random factor of all axes in a training step, at least 1.
    """

    names = {"rope-axial": {}}
    axes = (2, 3)
    examples = (
        ("rope-axial", "q R(y, x) . R(y', x') k", "image; half by rows, half by columns"),
        ("rope-axial,coords=separate", "the same, y and x from -1 to 1", "image; DINOv3's"),
    )

    layout: str = choice("interleaved", *LAYOUTS)
    base: float = number(100.0, most=1e12)
    order: str = choice("yx", "yx", "xy")
    coords: str = choice("patches", "patches", "separate", "max", "min")
    shift: float | None = number(None)
    jitter: float | None = number(None)
    rescale: float | None = number(None)

    def check(self) -> None:
        for name in ("shift", "jitter", "rescale"):
            value = getattr(self, name)
            if value is not None and self.coords == "patches":
                raise IrpeError(f"{name}={value:g} needs coords=separate, max or min")
            if value is not None and name != "shift" and value < 1.0:
                raise IrpeError(f"{name}={value:g} must be at least 1")

    def build(self, size: LayerSize) -> dict[str, Encoding]:
        return {"rope": AxialRotary(self, size)}

    def frequencies(self, head_dim: int, axes: int = 2) -> tuple[Tensor, float]:
        """Return radians per position of each axis ``[A, R / 2]``, and the factor 1."""
        if axes not in self.axes:
            raise IrpeError(f"axes={axes}: {self} takes positions of 2 or 3 numbers")
        each = head_dim // (2 * axes)  # pairs of channels for each axis
        if head_dim % (4 if axes == 2 else 2) or not each:
            needed = "a multiple of 4" if axes == 2 else "even and at least 6 on 3 axes"
            raise IrpeError(f"{self} needs a head_dim that is {needed}, not {head_dim}")
        some = powers(self.base, each)
        some = some if self.coords == "patches" else 2 * math.pi * some
        made = torch.block_diag(*[some.unsqueeze(0)] * axes)
        return (made if self.order == "yx" else made.flip(0)), 1.0

    @property
    def moves(self) -> bool:
        """Whether positions are moved in training mode."""
        return any(x is not None for x in (self.shift, self.jitter, self.rescale))

    def move(self, axes: int, device: torch.device) -> Tensor:
        """Return a random shift and factor of coordinates, ``[2, A]``, float32."""
        drawn = torch.rand(2 * axes + 1, device=device) * 2 - 1
        shift, jitter, rescale = drawn.split((axes, axes, 1))
        logs = jitter * math.log(self.jitter or 1.0) + rescale * math.log(self.rescale or 1.0)
        return torch.stack((shift * (self.shift or 0.0), logs.exp()))


class AxialRotary(Rotary):
    """Rotations by rows and columns. It has no parameters and no buffers."""

    spec: RopeAxial

    def frequencies(self, axes: int, length: Tensor | None = None) -> tuple[Tensor, float]:
        return self.spec.frequencies(self.head_dim, axes)

    def tables(self, geometry: Geometry, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.spec.coords != "patches" and not isinstance(geometry, Patches):
            raise IrpeError(f"{self.spec} needs the size of a grid, not {geometry!r}")
        if not (self.training and self.spec.moves):
            return super().tables(geometry, like)
        return self.compute(geometry, like, step_of(self, geometry, like.device).to(like.device))

    def coordinates(self, positions: Tensor, geometry: Geometry, move: Tensor | None) -> Tensor:
        coords = self.spec.coords
        if coords == "patches":
            return positions
        assert isinstance(geometry, Patches)
        sides = geometry.sides
        if coords != "separate":
            sides = (max(sides) if coords == "max" else min(sides),) * len(sides)
        placed = torch.stack(
            [(2 * x + 1) / n - 1 for x, n in zip(positions.unbind(-1), sides, strict=True)], -1
        )
        if move is None:
            return placed
        shift, factor = move.to(placed.dtype)
        return (placed + shift) * factor


class _Step:
    """The move of one training step, and the modules that have used it."""

    def __init__(self, module: AxialRotary, axes: int, device: torch.device) -> None:
        self.move, self.first = module.spec.move(axes, device), id(module)
        self.users: set[int] = set()


def step_of(module: AxialRotary, geometry: Geometry, device: torch.device) -> Tensor:
    """Return the move ``[2, A]`` of the current training step, see ``RopeAxial.move``.

    The geometry stores it, for other layers with the same geometry and for recomputation in a
    backward pass. A step ends when a module is called again.
    """
    held: dict[RopeAxial, _Step] = vars(geometry).setdefault("_steps", {})
    step = held.get(module.spec)
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        if step is None:
            raise IrpeError(
                f"{module.spec} moves positions once a step, and this layer is recomputed with a "
                f"new {geometry!r}: create it outside the recomputed function"
            )
        if step.first == id(module):
            module.spec.move(geometry.axes, device)  # keeps the random state as in the first run
        return step.move
    if step is None or id(module) in step.users:
        step = held[module.spec] = _Step(module, geometry.axes, device)
    step.users.add(id(module))
    return step.move
