"""Geometries: positions of queries and keys, and numbers of prefix tokens.

Shapes: L queries and S keys with prefix tokens; L' and S' without them; A axes (1 for text; 2 for
images: row, column; 3 for videos: frame, row, column).
"""

import itertools
from collections.abc import Callable, Hashable
from numbers import Integral
from typing import Any, Self

import torch
from torch import Tensor

from .cache import CACHE, remembered
from .errors import IrpeError

MOST = 2**31 - 1  # largest size of an axis
_FAKE = torch._C._TorchDispatchModeKey.FAKE


class Geometry:
    """Positions of the queries and keys of one attention call.

    Args:
        query: positions ``[L', A]``, or ``[B, L', A]`` if samples differ; integers, or floating
            point for encodings without tables.
        key: positions of the keys; None: those of the queries.
        prefix: number of tokens without a position (class token, registers) before the queries.
        key_prefix: number of such tokens before the keys; None: ``prefix``.

    Raises:
        IrpeError: if positions have a wrong shape or dtype, or a prefix is negative.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor | None = None,
        *,
        prefix: int = 0,
        key_prefix: int | None = None,
    ) -> None:
        self._query: Tensor | None = _positions("query positions", query)
        self._key: Tensor | None = self._query if key is None else _positions("key positions", key)
        if self._query.shape[-1] != self._key.shape[-1]:
            raise IrpeError(
                f"queries have {self._query.shape[-1]} axes and keys {self._key.shape[-1]}"
            )
        self._set_prefix(prefix, key_prefix)

    def _set_prefix(self, prefix: int, key_prefix: int | None) -> None:
        self.prefix = prefix
        self.key_prefix = prefix if key_prefix is None else key_prefix
        check_size("prefix", self.prefix, least=0)
        check_size("key_prefix", self.key_prefix, least=0)

    def _sizes(self) -> tuple[int, ...]:
        """Return the size of each axis; for geometries without explicit positions."""
        raise NotImplementedError

    def _all_positions(self, device: torch.device) -> Tensor:
        """Return the positions ``[L', A]`` of all tokens; without explicit positions."""
        raise NotImplementedError

    @property
    def axes(self) -> int:
        """A, the number of axes: 1 for text, 2 for images, 3 for videos."""
        assert self._query is not None
        return self._query.shape[-1]

    @property
    def batch(self) -> int | None:
        """B if samples have different positions, else None."""
        if self._query is None or self._key is None:
            return None
        sizes = {p.shape[0] for p in (self._query, self._key) if p.dim() == 3 and p.shape[0] != 1}
        if len(sizes) > 1:
            raise IrpeError(f"query and key positions are for different batches: {sorted(sizes)}")
        return sizes.pop() if sizes else None

    @property
    def query_length(self) -> int:
        """L, with prefix tokens."""
        return self.prefix + self._length(self._query)

    @property
    def key_length(self) -> int:
        """S, with prefix tokens."""
        return self.key_prefix + self._length(self._key)

    def _length(self, positions: Tensor | None) -> int:
        if positions is not None:
            return positions.shape[-2]
        length = 1
        for size in self._sizes():
            length = length * size
        return length

    def positions(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return positions of queries ``[(B,) L', A]`` and keys ``[(B,) S', A]``."""
        if self._query is None:
            whole = self._all_positions(device)
            return whole, whole
        assert self._key is not None
        query = self._query.to(device)
        return query, query if self._key is self._query else self._key.to(device)

    @property
    def explicit(self) -> bool:
        """Whether positions are explicit; else they follow from sizes."""
        return self._query is not None

    def readable(self) -> tuple[Tensor, Tensor] | None:
        """Return explicit positions if their values can be read without synchronisation.

        None if positions are not explicit, not on a CPU, or a graph is traced.
        """
        if self._query is None or self._key is None:
            return None
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None
        both = (self._query, self._key)
        plain = all(type(p) is Tensor and p.device.type == "cpu" for p in both)
        return None if torch._C._are_functorch_transforms_active() or not plain else both

    def offsets(self, device: torch.device) -> Tensor:
        """Return query position minus key position, ``[(B,) L', S', A]``."""
        query, key = self.positions(device)
        return query.unsqueeze(-2) - key.unsqueeze(-3)

    def check(self, batch: int, queries: int, keys: int | None = None) -> None:
        """Raise IrpeError if the numbers of tokens do not match the positions.

        Args:
            batch: B.
            queries: L.
            keys: S; None: not checked.
        """
        if torch.jit.is_tracing():  # sizes are tensors, and comparisons would be recorded
            return
        keys = self.key_length if keys is None else keys
        if self.query_length != queries or self.key_length != keys:
            raise IrpeError(
                f"{self!r} has {self.query_length} queries and {self.key_length} keys, "
                f"but there are L={queries} and S={keys} tokens"
            )
        if self.batch not in (None, batch):
            raise IrpeError(f"positions for {self.batch} samples do not match a batch of {batch}")

    def remember(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """Return ``build()``, computed once for all equal geometries.

        The value is stored in a cache that is bounded in bytes. Inference tensors have separate
        keys, since they cannot be saved for a backward pass. Nothing is stored while a graph is
        traced.
        """
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return build()
        if torch._C._get_dispatch_mode(_FAKE) is not None:  # FakeTensorMode takes no real tensors
            return build()
        key = (key, torch.is_inference_mode_enabled())
        owner = self._by_value()
        if owner is None:
            owner = self.__dict__.setdefault("_identity", _Identity()).owns(key)
        return remembered((owner, key), build, CACHE)

    def owner(self) -> Hashable:
        """Return a key that equal geometries share: their sizes, or a unique number."""
        value = self._by_value()
        if value is None:
            value = self.__dict__.setdefault("_identity", _Identity()).number
        return value

    def _by_value(self) -> tuple[str | int, ...] | None:
        """Return type and sizes, which equal geometries share; None for explicit positions."""
        if self._query is not None:
            return None
        sizes = (*self._sizes(), self.prefix, self.key_prefix)
        for size in sizes:
            if type(size) is not int:  # a symbol, or a traced size
                return None
        return (type(self).__name__, *sizes)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        mine = self._by_value()
        return isinstance(other, Geometry) and mine is not None and mine == other._by_value()

    def __hash__(self) -> int:
        value = self._by_value()
        return id(self) if value is None else hash(value)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_identity"}

    def __repr__(self) -> str:
        return (
            f"Geometry(L={self.query_length}, S={self.key_length}, axes={self.axes}, "
            f"prefix={self.prefix}, key_prefix={self.key_prefix})"
        )


class _Identity:
    """A number for a geometry with explicit positions; its cached values are dropped with it."""

    _numbers = itertools.count()

    def __init__(self) -> None:
        self.number, self.cache = next(self._numbers), CACHE
        self.keys: set[Hashable] = set()

    def owns(self, key: Hashable) -> int:
        self.keys.add(key)
        return self.number

    def __del__(self) -> None:
        for key in self.keys:  # self.cache: at exit, module globals may be gone
            self.cache.drop((self.number, key))


class Patches(Geometry):
    """All patches of an image or a video in row-major order, or a selection of them.

    Args:
        sides: number of patches by name of each axis.
        prefix: number of tokens before the patches.
        positions: integer positions of the tokens; None: those of all patches.
    """

    places: str  # meaning of a position, for error messages

    def __init__(self, sides: dict[str, int], prefix: int, positions: Tensor | None) -> None:
        for name, side in sides.items():
            check_size(name, side)
        self.sides = tuple(sides.values())
        if positions is None:
            self._query = self._key = None
            self._set_prefix(prefix, None)
            return
        super().__init__(positions, prefix=prefix)
        what = f"positions on a {type(self).__name__.lower()}"
        if positions.is_floating_point():
            raise IrpeError(f"{what} are integers, not {positions.dtype}")
        if positions.shape[-1] != len(sides):
            raise IrpeError(f"{what} are {self.places}, not {positions.shape[-1]} numbers")

    def select(self, indices: Tensor) -> Self:
        """Return the geometry of selected patches.

        Args:
            indices: integer ``[L']`` or ``[B, L']``, indices of the patches without the prefix.

        Raises:
            IrpeError: if indices have a wrong type, or this geometry is a selection already.
        """
        name = type(self).__name__.lower()
        if self._query is not None:
            raise IrpeError(f"select() needs a whole {name}; this one is a selection already")
        if not isinstance(indices, Tensor) or indices.dim() not in (1, 2):
            shape = list(indices.shape) if isinstance(indices, Tensor) else indices
            raise IrpeError(f"indices are a tensor [L'] or [B, L'], not {shape!r}")
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise IrpeError(f"indices are integers, not {indices.dtype}")
        rest, found = indices.long(), []  # short dtypes have no floor, or overflow
        for side in self.sides[:0:-1]:
            above = torch.div(rest, side, rounding_mode="floor")
            found.append(rest - above * side)
            rest = above
        positions = torch.stack((rest, *found[::-1]), dim=-1)
        kind: Any = type(self)
        return kind(*self.sides, prefix=self.prefix, positions=positions)

    @property
    def whole(self) -> bool:
        """Whether it has all patches, in order."""
        return self._query is None

    @property
    def axes(self) -> int:
        return len(self.sides)

    def _sizes(self) -> tuple[int, ...]:
        return self.sides

    def _all_positions(self, device: torch.device) -> Tensor:
        axes = [
            torch.arange(side, device=device).view(-1, *[1] * (self.axes - n - 1))
            for n, side in enumerate(self.sides)
        ]
        return torch.stack([x.expand(self.sides) for x in axes], dim=-1).flatten(0, -2)

    def __repr__(self) -> str:
        sides = ", ".join(str(side) for side in self.sides)
        selected = "" if self._query is None else f", positions={list(self._query.shape)}"
        return f"{type(self).__name__}({sides}, prefix={self.prefix}{selected})"


class Grid(Patches):
    """Patches of an image, row by row: token ``prefix + row * width + column``.

    Args:
        height: patches in a column (not pixels).
        width: patches in a row.
        prefix: number of tokens (class token, registers) before the patches.
        positions: integer (row, column) of the tokens, ``[L', 2]`` or ``[B, L', 2]``, if they are
            not the whole grid, for example with patch dropout or images of several shapes in a
            batch.

    Raises:
        IrpeError: if a size is not positive, or positions have a wrong shape or dtype.
    """

    places = "(row, column)"

    def __init__(
        self, height: int, width: int, prefix: int = 0, *, positions: Tensor | None = None
    ) -> None:
        super().__init__({"height": height, "width": width}, prefix, positions)
        self.height, self.width = height, width


class Volume(Patches):
    """Patches of a video, frame by frame and row by row.

    Token ``prefix + (frame * height + row) * width + column``. A frame is a patch in time: with
    tubelets of 2 pictures, 16 pictures make 8 frames.

    Args:
        frames: number of patches in time.
        height: patches in a column (not pixels).
        width: patches in a row.
        prefix: number of tokens (class token, registers) before the patches.
        positions: integer (frame, row, column) of the tokens, ``[L', 3]`` or ``[B, L', 3]``, if
            they are not the whole volume, for example with patch dropout.

    Raises:
        IrpeError: if a size is not positive, or positions have a wrong shape or dtype.
    """

    places = "(frame, row, column)"

    def __init__(
        self,
        frames: int,
        height: int,
        width: int,
        prefix: int = 0,
        *,
        positions: Tensor | None = None,
    ) -> None:
        super().__init__({"frames": frames, "height": height, "width": width}, prefix, positions)
        self.frames, self.height, self.width = frames, height, width


class Sequence(Geometry):
    """Tokens of a text at positions 0 to length - 1, or at explicit positions.

    Args:
        length: number of tokens, without the prefix.
        prefix: number of tokens without a position, before the others.
        positions: ``[length]`` or ``[B, length]``; None: 0 to length - 1. Rotary and sinusoidal
            encodings take floating point too.
        keys: positions of the keys, ``[S]`` or ``[B, S]``, if they differ from the queries
            (cached tokens, decoding); None: those of the queries.
        key_prefix: number of tokens without a position before the keys; None: ``prefix``.

    Raises:
        IrpeError: if length is not positive, or positions have another length, a wrong shape or a
            16-bit dtype.
    """

    def __init__(
        self,
        length: int,
        prefix: int = 0,
        *,
        positions: Tensor | None = None,
        keys: Tensor | None = None,
        key_prefix: int | None = None,
    ) -> None:
        check_size("length", length)
        self.length = length
        for given in (positions, keys):
            if given is None:
                continue
            if not isinstance(given, Tensor) or given.dim() not in (1, 2):
                shape = list(given.shape) if isinstance(given, Tensor) else given
                raise IrpeError(f"positions are a tensor [L] or [B, L], not {shape!r}")
        if positions is None and keys is None:
            self._query = self._key = None
            self._set_prefix(prefix, key_prefix)
            return
        if positions is None:
            positions = torch.arange(length, device="cpu")
        if positions.shape[-1] != length:
            raise IrpeError(f"length={length} does not match positions {list(positions.shape)}")
        super().__init__(
            positions.unsqueeze(-1),
            None if keys is None else keys.unsqueeze(-1),
            prefix=prefix,
            key_prefix=key_prefix,
        )

    @property
    def axes(self) -> int:
        return 1

    def _sizes(self) -> tuple[int, ...]:
        return (self.length,)

    def _all_positions(self, device: torch.device) -> Tensor:
        return torch.arange(self.length, device=device).unsqueeze(-1)


def check_size(name: str, size: object, least: int = 1) -> None:
    """Raise IrpeError unless a size is an integer from ``least`` to ``MOST``."""
    if torch.jit.is_tracing():  # sizes are tensors
        return
    integer = isinstance(size, int | torch.SymInt | Integral) and not isinstance(size, bool)
    if not integer or size < least:  # type: ignore[operator]
        raise IrpeError(f"{name}={size!r} is not an integer of at least {least}")
    if isinstance(size, int) and size > MOST:  # not of symbols: it would add a guard
        raise IrpeError(f"{name}={size} is more than {MOST}")


def _positions(name: str, positions: Tensor) -> Tensor:
    if not isinstance(positions, Tensor) or positions.dim() not in (2, 3):
        shape = list(positions.shape) if isinstance(positions, Tensor) else positions
        raise IrpeError(f"{name} are a tensor [L, A] or [B, L, A], not {shape!r}")
    if positions.dtype == torch.bool or positions.is_complex():
        raise IrpeError(f"positions are integers or fractions, not {positions.dtype}")
    if positions.is_floating_point() and positions.element_size() < 4:
        raise IrpeError(
            f"{name} are {positions.dtype}, which rounds large positions: use integers or float32"
        )
    # Differences of short and unsigned integers would overflow.
    return positions if positions.is_floating_point() else positions.long()
