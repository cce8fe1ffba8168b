"""Digests of training data, to detect changes when a run is resumed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from training.errors import UserError

# Number of files and hash of each part: a class folder, an archive or a file.
Digest = dict[str, tuple[int, str]]
_SHOWN = 6
_THREADS = 16  # for network file systems


def stat_digest(parts: Mapping[str, Iterable[str]]) -> Digest:
    """Digest files by their names, sizes and modification times.

    Args:
        parts: the paths of the files of each part, by name of the part.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(parts, pool.map(_hash_stats, parts.values()), strict=True))


def array_digest(**parts: Iterable[np.ndarray]) -> Digest:
    """Digest arrays by their contents; ``parts``: arrays by name of the part."""
    found: Digest = {}
    for part, arrays in parts.items():
        hashed = hashlib.blake2b(digest_size=8)
        for array in arrays:
            hashed.update(np.ascontiguousarray(array).data)
        found[part] = 1, hashed.hexdigest()
    return found


def parts_below(root: str) -> dict[str, list[str]]:
    """Return the files of a folder, with a part for each direct entry."""
    if not os.path.isdir(root):
        return {root: [root]} if os.path.exists(root) else {}
    parts: dict[str, list[str]] = {}
    for entry in os.scandir(root):
        walked = os.walk(entry.path) if entry.is_dir() else [(root, [], [entry.name])]
        parts[entry.path] = [os.path.join(at, name) for at, _, names in walked for name in names]
    return parts


def changes(before: Digest, now: Digest) -> list[str]:
    """Return a line for each part that differs between two digests."""
    lines = []
    for part in sorted({**before, **now}):
        (was, old), (count, new) = before.get(part, (0, "")), now.get(part, (0, ""))
        if old == new:
            continue
        if was != count:
            lines.append(f"{part!r} had {was} {'file' if was == 1 else 'files'}, has {count}")
        elif count == 1:
            lines.append(f"{part!r} changed")
        else:
            lines.append(f"{part!r} still has {count} files, but some of them changed")
    return lines


def check_unchanged(
    before: Digest, now: Digest, *, allowed: bool, say: Callable[[str], None]
) -> None:
    """Raise :class:`UserError` if the data changed; if ``allowed``, print the changes instead."""
    lines = changes(before, now)
    if not lines:
        return
    if not allowed:
        more = f" and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise UserError(
            f"resume: the data changed since the run's state was saved: "
            f"{'; '.join(lines[:_SHOWN])}{more}; restore the data, start without resume, or "
            "resume on the changed data with --allow-changed-data"
        )
    for line in lines:
        say(f"the data changed: {line}")


def _hash_stats(paths: Iterable[str]) -> tuple[int, str]:
    hashed, count = hashlib.blake2b(digest_size=8), 0
    for path in sorted(paths):
        try:
            found = os.stat(path)
        except OSError:
            continue
        count += 1
        hashed.update(os.fsencode(f"{path}\0{found.st_size}\0{found.st_mtime_ns}\n"))
    return count, hashed.hexdigest()
