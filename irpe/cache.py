"""A cache of bucket ids and other tensors computed from geometries, bounded in bytes."""

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

# Bytes. A map of bucket ids of DETR's 42x42 patches takes 25 MB, and images have several sizes.
LIMIT = 2**29
# Bytes counted for each value besides its tensors, so that the number of values is bounded too.
OVERHEAD = 1024


class Cache:
    """Values by key; the least recently used ones are dropped if their bytes exceed a limit.

    Args:
        limit: maximum bytes of all values. A larger value is not stored.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit, self.used = limit, 0
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.RLock()  # reentrant: garbage collection may call drop at any time

    def get(self, key: Hashable, default: Any = None) -> Any:
        """Return the value of a key, or the default if there is none."""
        with self._lock:
            if key not in self._values:
                return default
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: Hashable, value: Any) -> None:
        """Store a value, and drop others until all fit."""
        size = OVERHEAD + nbytes(value)
        if size > self.limit:
            return
        with self._lock:
            self.drop(key)
            self._values[key] = value, size
            self.used += size
            while self.used > self.limit:
                self.drop(next(iter(self._values)))

    def drop(self, key: Hashable) -> None:
        """Remove a key, if present."""
        with self._lock:
            _, size = self._values.pop(key, (None, 0))
            self.used -= size

    def clear(self) -> None:
        """Remove all values."""
        with self._lock:
            self._values.clear()
            self.used = 0


CACHE = Cache()
_MISSING = object()


def remembered(key: Hashable, build: Callable[[], Any], cache: Cache | None = None) -> Any:
    """Return the cached value of a key, or ``build()``, computed once.

    Values are computed on the default CUDA stream, so that calls on any stream can use them. A
    value that is computed while a CUDA graph is captured is not stored: the graph owns its memory.
    """
    cache = CACHE if cache is None else cache
    value = cache.get(key, _MISSING)
    if value is not _MISSING:
        return value
    if capturing():
        return build()
    value = _on_default_stream(build) if on_side_stream() else build()
    cache.put(key, value)
    return value


def capturing() -> bool:
    """Return whether a CUDA graph is being captured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def on_side_stream() -> bool:
    """Return whether the current CUDA stream is not the default stream."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return False
    return torch.cuda.current_stream() != torch.cuda.default_stream()


def _on_default_stream(build: Callable[[], Any]) -> Any:
    # A new thread uses the default stream and no memory pool of a graph.
    device, inference = torch.cuda.current_device(), torch.is_inference_mode_enabled()
    torch.cuda.current_stream().synchronize()

    def run() -> Any:
        with torch.cuda.device(device), torch.inference_mode(inference):
            value = build()
            torch.cuda.current_stream().synchronize()
            return value

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def clear_cache() -> None:
    """Clear the cache of tensors computed from geometries, such as bucket ids.

    They are recomputed when needed. The cache has at most 512 MiB.
    """
    CACHE.clear()


def nbytes(value: Any, depth: int = 4) -> int:
    """Return the bytes of all tensors in a value: a tensor, a container or an object."""
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()
    if depth == 0 or value is None or isinstance(value, int | float | str):
        return 0
    if isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, tuple | list):
        parts = list(value)
    elif dataclasses.is_dataclass(value):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    return sum(nbytes(part, depth - 1) for part in parts)
