"""Bucket ids of a geometry, in a compact form that expands on demand and once for all layers."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import IrpeError
from ..geometry import Geometry
from ..spec import RPE, T5, Huang, Shaw, Spec, parse
from .image import image_buckets
from .text import ClipBuckets, log_buckets


class BucketFunction(Hashable, Protocol):
    """From integer offsets ``[..., A]`` to bucket ids int64 ``[...]`` below ``size``."""

    @property
    def size(self) -> int: ...

    def __call__(self, offsets: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True, eq=False)
class BucketIds:
    """Which bucket each pair of a query and a key falls into.

    Args:
        function: from offsets to ids.
        geometry: where the tokens are.
        by_key: offsets are key - query instead of query - key, and a row of numbers per bucket
            belongs to the key: the form that the query table's counterpart, ``rpe_q``, needs.
        block: (start, stop, keys): only the queries from start to stop, and the first keys.
    """

    function: BucketFunction
    geometry: Geometry
    by_key: bool = False
    block: tuple[int, int, int] | None = None

    @property
    def size(self) -> int:
        """N, the number of buckets; pairs with a prefix token share the last one."""
        return self.function.size + (self.geometry.prefix > 0 or self.geometry.key_prefix > 0)

    def dense(self, device: torch.device) -> Tensor:
        """Ids int64 ``[L, S]``, or ``[B, L, S]`` where each sample has positions of its own."""
        key = ("dense", self.function, self.by_key, device)
        return self._cut(self.geometry.remember(key, lambda: self._dense(device)))

    def _cut(self, pairs: Tensor) -> Tensor:
        if self.block is None:
            return pairs
        start, stop, keys = self.block
        return pairs[..., start:stop, :keys]

    def _dense(self, device: torch.device) -> Tensor:
        geometry = self.geometry
        offsets = geometry.offsets(device)
        ids = self.function(-offsets if self.by_key else offsets)
        if geometry.prefix or geometry.key_prefix:
            ids = F.pad(ids, (geometry.key_prefix, 0, geometry.prefix, 0), value=self.size - 1)
        return ids.squeeze(0) if ids.dim() == 3 and geometry.batch is None else ids

    def flat(self, device: torch.device) -> Tensor:
        """Index ``[1 | B, 1, L * S]`` into rows of N numbers laid end to end, ``[B, H, L * N]``.

        The rows are the queries', with ``by_key`` the keys' (``[B, H, S * N]``).
        """
        key = ("flat", self.function, self.by_key, self.block, device)
        return self.geometry.remember(key, lambda: self._flat(device))

    def _flat(self, device: torch.device) -> Tensor:
        # The whole is not remembered, since who needs the flat form does not need both; the
        # blocks are cut from one that is.
        ids = self._dense(device) if self.block is None else self.dense(device)
        rows = torch.arange(ids.shape[-1 if self.by_key else -2], device=device) * self.size
        ids = ids + (rows if self.by_key else rows.unsqueeze(-1))
        return ids.reshape(-1, 1, ids.shape[-2] * ids.shape[-1])

    def compact(self, device: torch.device) -> Tensor:
        """Ids ``[1 | B, L, S]`` of the fewest bytes, for kernels."""
        small = next(d for d in (torch.uint8, torch.int16, torch.int32) if fits(self.size, d))
        ids = self._dense(device).to(small)
        return ids.reshape(-1, *ids.shape[-2:])

    def distances(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Euclidean distances ``[L, S]``, or ``[B, L, S]``; of pairs with a prefix token 0."""
        key = ("distances", device, dtype)
        return self._cut(self.geometry.remember(key, lambda: self._distances(device, dtype)))

    def _distances(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        geometry = self.geometry
        offsets = geometry.offsets(device).to(dtype)
        far = offsets.squeeze(-1).abs() if geometry.axes == 1 else offsets.square().sum(-1).sqrt()
        if geometry.prefix or geometry.key_prefix:
            far = F.pad(far, (geometry.key_prefix, 0, geometry.prefix, 0))
        return far.squeeze(0) if far.dim() == 3 and geometry.batch is None else far


def fits(size: int, dtype: torch.dtype) -> bool:
    """Whether ids below size can be held."""
    return size - 1 <= torch.iinfo(dtype).max


def bucket_functions(spec: Spec, causal: bool = False) -> tuple[BucketFunction, ...]:
    """The bucket functions of a spec: (rows, columns) for method ``cross``, else one.

    ``causal`` decides for a T5 spec that leaves open whether later keys count.
    """
    match spec:
        case RPE():
            return image_buckets(spec)
        case Shaw():
            return (ClipBuckets(spec.clip),)
        case Huang():
            return (ClipBuckets(spec.clip, signed=spec.method != 1),)
        case T5():
            both = not causal if spec.bidirectional is None else spec.bidirectional
            return (log_buckets(spec, both),)
    raise IrpeError(f"{spec} has no buckets: rpe-..., shaw, huang1 to huang4 and t5 have")


def bucket_ids(
    spec: str | Spec, geometry: Geometry, device: torch.device | str = "cpu"
) -> tuple[Tensor | tuple[Tensor, Tensor], int]:
    """Bucket ids of an encoding, and the number of buckets.

    Args:
        spec: the encoding; a T5 that does not say otherwise is bidirectional.
        geometry: an ``irpe.Grid``, for texts an ``irpe.Sequence``; with prefix tokens one more
            bucket holds all pairs with one.

    Returns:
        Ids int64 ``[L, S]`` (``[B, L, S]`` for per-sample positions) of offsets query - key, for
        method ``cross`` a pair (rows, columns) of these; and N, the size of one table.
    """
    if not isinstance(geometry, Geometry):
        raise IrpeError(f"geometry={geometry!r} is not a geometry: make an irpe.Grid")
    maps = [BucketIds(function, geometry) for function in bucket_functions(parse(spec))]
    ids = tuple(m.dense(torch.device(device)) for m in maps)
    return (ids[0] if len(ids) == 1 else ids), maps[0].size  # type: ignore[return-value]
