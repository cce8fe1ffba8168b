"""Where tokens are: integer positions of queries and keys, and the prefix tokens before them.

Shapes: L queries and S keys, prefix tokens included; A axes (2 for images: row, column).
"""

from collections.abc import Callable, Hashable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .errors import IrpeError


class Geometry:
    """Positions of the queries and of the keys of one attention call.

    Args:
        query: integer positions ``[L', A]`` or, for each sample its own, ``[B, L', A]``.
        key: positions of the keys; ``None``: the queries themselves.
        prefix: tokens without a position (class token, registers) before the queries.
        key_prefix: the same before the keys; ``None``: as before the queries.

    Raises:
        IrpeError: for positions of a wrong shape or a negative prefix.
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
        _check_size("prefix", self.prefix, least=0)
        _check_size("key_prefix", self.key_prefix, least=0)
        self._memo: dict[Hashable, Any] = {}

    def _count(self) -> int:
        """Tokens whose positions nobody gave; they are made on the device that needs them."""
        raise NotImplementedError

    def _made(self, device: torch.device) -> Tensor:
        """Positions ``[L', A]`` that nobody gave."""
        raise NotImplementedError

    @property
    def axes(self) -> int:
        """A: 2 for images, 1 for text."""
        assert self._query is not None
        return self._query.shape[-1]

    @property
    def batch(self) -> int | None:
        """B where each sample has positions of its own, else None."""
        if self._query is None or self._key is None:
            return None
        sizes = {p.shape[0] for p in (self._query, self._key) if p.dim() == 3 and p.shape[0] != 1}
        if len(sizes) > 1:
            raise IrpeError(f"query and key positions are for different batches: {sorted(sizes)}")
        return sizes.pop() if sizes else None

    @property
    def query_length(self) -> int:
        """L, prefix included."""
        return self.prefix + (self._count() if self._query is None else self._query.shape[-2])

    @property
    def key_length(self) -> int:
        """S, prefix included."""
        return self.key_prefix + (self._count() if self._key is None else self._key.shape[-2])

    def positions(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Positions of queries ``[(B,) L', A]`` and keys ``[(B,) S', A]``, prefix left out."""
        if self._query is None:
            made = self._made(device)
            return made, made
        assert self._key is not None
        query = self._query.to(device)
        return query, query if self._key is self._query else self._key.to(device)

    @property
    def explicit(self) -> bool:
        """Whether positions were given; else they count up from 0."""
        return self._query is not None

    def readable(self) -> tuple[Tensor, Tensor] | None:
        """Positions that were given, where their values can be checked without waiting for them.

        None where nobody gave any, they are on another device, or a graph is traced.
        """
        if self._query is None or self._key is None:
            return None
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None
        both = (self._query, self._key)
        plain = all(type(p) is Tensor and p.device.type == "cpu" for p in both)
        return None if torch._C._are_functorch_transforms_active() or not plain else both

    def offsets(self, device: torch.device) -> Tensor:
        """Query position minus key position, ``[(B,) L', S', A]``."""
        query, key = self.positions(device)
        for given in (query, key):
            if given.dtype == torch.bool or given.is_complex():
                raise IrpeError(f"positions are numbers on a line, not {given.dtype}")
        query, key = (p if p.is_floating_point() else p.long() for p in (query, key))
        return query.unsqueeze(-2) - key.unsqueeze(-3)

    def remember(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """The value of ``build()``, made once for this geometry.

        Inference tensors are kept apart, since they cannot be saved for a backward pass; nothing
        is kept while a graph is traced, whose tensors mean nothing outside of it.
        """
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return build()
        key = (key, torch.is_inference_mode_enabled())
        if key not in self._memo:
            value = build()
            if any(isinstance(v, Tensor) and type(v) is not Tensor for v in _each(value)):
                return value  # a fake tensor, or another stand-in of a tracer
            self._memo[key] = value
        return self._memo[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memo": {}}

    def __repr__(self) -> str:
        return (
            f"Geometry(L={self.query_length}, S={self.key_length}, axes={self.axes}, "
            f"prefix={self.prefix}, key_prefix={self.key_prefix})"
        )


class Grid(Geometry):
    """Patches of an image, row by row: token ``prefix + row * width + column``.

    Args:
        height, width: patches in a column and in a row (not pixels).
        prefix: class token and registers, before the patches.
        positions: integer (row, column) of the tokens there are, ``[L', 2]`` or ``[B, L', 2]``,
            where they are not the whole grid (patches dropped at random, images of several shapes
            in one batch).

    Raises:
        IrpeError: for sizes that are not positive, or positions of a wrong shape.
    """

    def __init__(
        self, height: int, width: int, prefix: int = 0, *, positions: Tensor | None = None
    ) -> None:
        _check_size("height", height)
        _check_size("width", width)
        self.height, self.width = height, width
        if positions is not None:
            super().__init__(positions, prefix=prefix)
            if positions.is_floating_point():
                raise IrpeError(f"positions on a grid are integers, not {positions.dtype}")
            if positions.shape[-1] != 2:
                raise IrpeError(
                    f"positions on a grid are (row, column), not {positions.shape[-1]} numbers"
                )
        else:
            self._query = self._key = None
            self._set_prefix(prefix, None)

    def select(self, indices: Tensor) -> "Grid":
        """The grid of the patches kept.

        Args:
            indices: ``[L']`` or ``[B, L']``, counted row by row without the prefix.
        """
        if self._query is not None:
            raise IrpeError("select() needs a whole grid; this one holds a selection already")
        if not isinstance(indices, Tensor) or indices.dim() not in (1, 2):
            shape = list(indices.shape) if isinstance(indices, Tensor) else indices
            raise IrpeError(f"indices are a tensor [L'] or [B, L'], not {shape!r}")
        if indices.is_floating_point() or indices.dtype == torch.bool:
            raise IrpeError(f"indices are integers, not {indices.dtype}")
        rows = torch.div(indices, self.width, rounding_mode="floor")
        positions = torch.stack((rows, indices - rows * self.width), dim=-1)
        return Grid(self.height, self.width, self.prefix, positions=positions)

    @property
    def whole(self) -> bool:
        """Whether all patches are there, row by row."""
        return self._query is None

    @property
    def axes(self) -> int:
        return 2

    def _count(self) -> int:
        return self.height * self.width

    def _made(self, device: torch.device) -> Tensor:
        rows = torch.arange(self.height, device=device).unsqueeze(1).expand(-1, self.width)
        columns = torch.arange(self.width, device=device).expand(self.height, -1)
        return torch.stack((rows, columns), dim=-1).flatten(0, 1)

    def __repr__(self) -> str:
        selected = "" if self._query is None else f", positions={list(self._query.shape)}"
        return f"Grid({self.height}, {self.width}, prefix={self.prefix}{selected})"


class Sequence(Geometry):
    """Tokens of a text at positions 0 to length - 1, or at explicit positions.

    Args:
        length: number of tokens, prefix left out.
        prefix: tokens without a position, before the others.
        positions: ``[length]`` or ``[B, length]`` where they are not 0 to length - 1. They may
            have gaps, start anywhere and, for rotary and sinusoidal encodings, be fractions.
        keys: positions of the keys, ``[S]`` or ``[B, S]``, where they are not the queries
            (cached tokens, decoding).
        key_prefix: tokens without a position before the keys; ``None``: as before the queries.
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
        _check_size("length", length)
        self.length = length
        for given in (positions, keys):
            if given is not None and not isinstance(given, Tensor):
                raise IrpeError(f"positions are a tensor [L] or [B, L], not {given!r}")
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

    def _count(self) -> int:
        return self.length

    def _made(self, device: torch.device) -> Tensor:
        return torch.arange(self.length, device=device).unsqueeze(-1)


def _each(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _check_size(name: str, size: object, least: int = 1) -> None:
    if torch.jit.is_tracing():  # sizes are tensors there
        return
    integer = isinstance(size, int | torch.SymInt | Integral) and not isinstance(size, bool)
    if not integer or size < least:  # type: ignore[operator]
        raise IrpeError(f"{name}={size!r} is not an integer of at least {least}")


def _positions(name: str, positions: Tensor) -> Tensor:
    if not isinstance(positions, Tensor) or positions.dim() not in (2, 3):
        shape = list(positions.shape) if isinstance(positions, Tensor) else positions
        raise IrpeError(f"{name} are a tensor [L, A] or [B, L, A], not {shape!r}")
    return positions
