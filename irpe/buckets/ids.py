"""Bucket ids of a geometry, computed on demand and once for equal geometries."""

import hashlib
from collections.abc import Hashable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import IrpeError
from ..geometry import Geometry


class BucketFunction(Hashable, Protocol):
    """A function from integer offsets ``[..., A]`` to bucket ids int64 ``[...]`` in [0, size).

    It is hashable by value, such as a frozen dataclass, so that layers share its ids.

    Optional attributes: ``opposite``, the id of the negated offset, "same" or "reversed"
    (size - 1 - id), so that a GPU needs one map less. ``prefix_ids``, the buckets of (prefix query,
    other key) and (other query, prefix key); the last bucket is then for pairs of prefix tokens.
    """

    @property
    def size(self) -> int: ...

    def __call__(self, offsets: Tensor) -> Tensor: ...


FUNCTIONS: dict[int, BucketFunction] = {}
_NUMBERS: dict[BucketFunction, int] = {}


def number_of(function: BucketFunction) -> int:
    """Return the key of a bucket function in ``FUNCTIONS``, equal for equal functions.

    torch operators take numbers, but not functions. The number is a hash of the function's repr, so
    that it is the same in other processes.
    """
    number = _NUMBERS.get(function)
    if number is None:
        text = f"{type(function).__module__}.{type(function).__qualname__} {function!r}"
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
        while number in FUNCTIONS:  # a collision
            number += 1
        FUNCTIONS[number] = function
        _NUMBERS[function] = number
    return number


class BucketIds:
    """The bucket of each pair of a query and a key.

    A term sets their orientation: by query (offsets query - key; a row of numbers belongs to a
    query) or by key (offsets key - query; a row belongs to a key).

    Args:
        function: maps offsets to ids.
        geometry: positions of the tokens.
        number: ``number_of(function)``, if known; torch.compile cannot compute it.
    """

    __slots__ = ("by_key", "function", "geometry", "number")

    def __init__(
        self, function: BucketFunction, geometry: Geometry, number: int | None = None
    ) -> None:
        if not isinstance(geometry, Geometry):
            raise IrpeError(f"geometry={geometry!r} is not a geometry: make an irpe.Grid")
        self.function, self.geometry, self.by_key = function, geometry, False
        self.number = number

    def oriented(self, by_key: bool) -> "BucketIds":
        """Return the same buckets, by key or by query."""
        if self.by_key == by_key:
            return self
        turned = BucketIds(self.function, self.geometry, self.number)
        turned.by_key = by_key
        return turned

    @property
    def size(self) -> int:
        """N, the number of buckets; pairs with a prefix token share the last one."""
        return self.function.size + (self.geometry.prefix > 0 or self.geometry.key_prefix > 0)

    def dense(self, device: torch.device) -> Tensor:
        """Return ids int64 ``[L, S]``, or ``[B, L, S]`` if samples have different positions."""
        key = ("dense", self.function, self.by_key, device)
        return self.geometry.remember(key, lambda: self._dense(device))

    def _dense(self, device: torch.device) -> Tensor:
        offsets = self.geometry.offsets(device)
        ids = self._padded(self.function(-offsets if self.by_key else offsets), self.size - 1)
        apart = prefix_ids(self.function)
        if apart is not None:
            queries, keys = self.geometry.prefix, self.geometry.key_prefix
            ids[..., :queries, keys:], ids[..., queries:, :keys] = apart[
                :: -1 if self.by_key else 1
            ]
        return ids

    def _padded(self, pairs: Tensor, value: int) -> Tensor:
        """Pad ``[(B,) L', S']`` for prefix tokens."""
        geometry = self.geometry
        if geometry.prefix or geometry.key_prefix:
            pairs = F.pad(pairs, (geometry.key_prefix, 0, geometry.prefix, 0), value=value)
        return pairs.squeeze(0) if pairs.dim() == 3 and geometry.batch is None else pairs

    def flat(self, device: torch.device) -> Tensor:
        """Return the index ``[1 | B, 1, L * S]`` into flattened rows of N numbers.

        The rows are the queries', ``[B, H, L * N]``, or by key the keys', ``[B, H, S * N]``.
        """
        key = ("flat", self.function, self.by_key, device)
        # Do not cache the dense ids: callers need only one form.
        return self.geometry.remember(
            key, lambda: flat_index(self._dense(device), self.size, self.by_key)
        )

    def compact(self, device: torch.device) -> Tensor:
        """Return ids ``[1 | B, L, S]`` of the smallest dtype, for kernels."""
        small = next(d for d in (torch.uint8, torch.int16, torch.int32) if fits(self.size, d))
        ids = self._dense(device).to(small)
        return ids.unsqueeze(0) if ids.dim() == 2 else ids

    def distances(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return Euclidean distances ``[(B,) L, S]``; 0 for pairs with a prefix token."""
        key = ("distances", device, dtype)
        return self.geometry.remember(key, lambda: self._distances(device, dtype))

    def _distances(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        offsets = self.geometry.offsets(device).to(dtype)
        one_axis = self.geometry.axes == 1
        far = offsets.squeeze(-1).abs() if one_axis else offsets.square().sum(-1).sqrt()
        return self._padded(far, 0)


def prefix_ids(function: BucketFunction) -> tuple[int, int] | None:
    """Return the ids of pairs with one prefix token; None if they have the last bucket."""
    found: tuple[int, int] | None = getattr(function, "prefix_ids", None)
    return found


def flat_index(ids: Tensor, size: int, by_key: bool) -> Tensor:
    """Return the index ``[1 | B, 1, L * S]`` of ids ``[(B,) L, S]`` into flattened rows."""
    rows = torch.arange(ids.shape[-1 if by_key else -2], device=ids.device) * size
    ids = ids + (rows if by_key else rows.unsqueeze(-1))
    return (ids.unsqueeze(0) if ids.dim() == 2 else ids).flatten(1).unsqueeze(1)


def fits(size: int, dtype: torch.dtype) -> bool:
    """Return whether a dtype can store ids below a size."""
    return size - 1 <= torch.iinfo(dtype).max
