"""What all geometries are: positions of queries and keys, and the prefix tokens before them.

Shapes: L queries and S keys, prefix tokens included; A axes (2 for images: row, column).
"""

from collections.abc import Callable, Hashable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..errors import IrpeError

MOST = 2**31 - 1  # tokens in a row


class Geometry:
    """Positions of the queries and of the keys of one attention call.

    Args:
        query: positions ``[L', A]`` or, for each sample its own, ``[B, L', A]``: integers, or
            fractions for encodings without tables.
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
        check_size("prefix", self.prefix, least=0)
        check_size("key_prefix", self.key_prefix, least=0)
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
        query, key = (p if p.is_floating_point() else p.long() for p in (query, key))
        return query.unsqueeze(-2) - key.unsqueeze(-3)

    def check(self, batch: int, queries: int, keys: int | None = None) -> None:
        """Raises IrpeError where tokens do not match the positions.

        Args:
            batch: B. queries: L. keys: S; None: not looked at.
        """
        if torch.jit.is_tracing():  # sizes are tensors there, and comparing them is recorded
            return
        keys = self.key_length if keys is None else keys
        if self.query_length != queries or self.key_length != keys:
            raise IrpeError(
                f"{self!r} has {self.query_length} queries and {self.key_length} keys, "
                f"but the tokens are L={queries} and S={keys}"
            )
        if self.batch not in (None, batch):
            raise IrpeError(f"positions for {self.batch} samples do not match a batch of {batch}")

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


def _each(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def check_size(name: str, size: object, least: int = 1) -> None:
    """Raises IrpeError for what is no integer, a smaller one, or one that no tensor can have."""
    if torch.jit.is_tracing():  # sizes are tensors there
        return
    integer = isinstance(size, int | torch.SymInt | Integral) and not isinstance(size, bool)
    if not integer or size < least:  # type: ignore[operator]
        raise IrpeError(f"{name}={size!r} is not an integer of at least {least}")
    if isinstance(size, int) and size > MOST:  # of symbols it would be a guard
        raise IrpeError(f"{name}={size} is more than {MOST}")


def _positions(name: str, positions: Tensor) -> Tensor:
    if not isinstance(positions, Tensor) or positions.dim() not in (2, 3):
        shape = list(positions.shape) if isinstance(positions, Tensor) else positions
        raise IrpeError(f"{name} are a tensor [L, A] or [B, L, A], not {shape!r}")
    if positions.dtype == torch.bool or positions.is_complex():
        raise IrpeError(f"positions are numbers on a line, not {positions.dtype}")
    return positions
