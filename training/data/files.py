"""Files by name, in a folder or a zip archive.

A path may continue inside an archive: ``annotations.zip/annotations/instances_val2017.json``.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from training.errors import UserError


class Folder:
    """Files below a folder."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._listed: dict[str, frozenset[str]] = {}

    def __contains__(self, name: str) -> bool:
        # List each folder once, since checking COCO's files one by one is slow.
        folder, file = os.path.split(self.path(name))
        if folder not in self._listed:
            self._listed[folder] = frozenset()
            with contextlib.suppress(OSError):
                self._listed[folder] = frozenset(os.listdir(folder))
        return file in self._listed[folder]

    def read(self, name: str) -> bytes:
        return Path(self.path(name)).read_bytes()

    def path(self, name: str) -> str:
        return os.path.join(self.root, name)


class Archive:
    """Files in the folder ``inner`` of a zip archive.

    If ``inner`` is "" and all files are in one folder, as in COCO's archives, names may omit it.
    Each process opens the archive itself: an inherited handle shares its file position.
    """

    def __init__(self, archive: str, inner: str = "") -> None:
        self.archive, self.folders = archive, [inner]
        self._open: tuple[int, zipfile.ZipFile] | None = None
        if not inner:
            # macOS adds __MACOSX to archives.
            names = [name for name in self._zip().namelist() if not name.startswith("__MACOSX/")]
            first = {name.partition("/")[0] if "/" in name else "" for name in names}
            self.folders = [*first, ""] if len(first) == 1 else [""]

    def __contains__(self, name: str) -> bool:
        return self._member(name) is not None

    def read(self, name: str) -> bytes:
        """Return the bytes of a file; raise OSError if it is missing or damaged."""
        member = self._member(name)
        if member is None:
            raise FileNotFoundError(f"not in the archive {self.archive}")
        try:
            return self._zip().read(member)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise OSError(f"damaged or encrypted in its archive: {error}") from error

    def path(self, name: str) -> str:
        return os.path.join(self.archive, self.folders[0], name)

    def _member(self, name: str) -> str | None:
        held = self._zip().NameToInfo
        names = (str(PurePosixPath(folder, name)) for folder in self.folders)
        return next((member for member in names if member in held), None)

    def _zip(self) -> zipfile.ZipFile:
        if self._open is None or self._open[0] != os.getpid():
            self._open = (os.getpid(), zipfile.ZipFile(self.archive))
        return self._open[1]

    def __getstate__(self) -> dict[str, object]:
        return {"archive": self.archive, "folders": self.folders, "_open": None}


def open_files(path: str, option: str) -> Folder | Archive:
    """Open a folder, a zip archive or a folder in one; ``option``: its name in errors."""
    archive, inner = _through_archive(path)
    if archive is None:
        if not os.path.isdir(path):
            state = "is not a folder or zip archive" if os.path.exists(path) else "does not exist"
            raise UserError(f"{option}: {path!r} {state}")
        return Folder(path)
    try:
        return Archive(archive, inner)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{option}: {archive!r} is not a readable zip archive: {error}") from error


def read_file(path: str, option: str) -> bytes:
    """Return the bytes of a file; raise :class:`UserError` with ``option`` if it is unreadable."""
    archive, inner = _through_archive(path)
    if archive is None and not os.path.exists(path):
        raise UserError(f"{option}: {path!r} does not exist")
    try:
        if archive is None:
            return Path(path).read_bytes()
        if not inner:
            raise UserError(
                f"{option}: {path!r} is an archive; name a file in it, as in "
                f"{os.path.join(path, 'annotations/instances_val2017.json')}"
            )
        folder, _, name = inner.rpartition("/")
        return Archive(archive, folder or ".").read(name)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{option}: {path!r} cannot be read: {error}") from error


def _through_archive(path: str) -> tuple[str | None, str]:
    """Split a path into a zip archive, or None, and the path inside."""
    for part in (Path(path), *Path(path).parents):
        if part.suffix.lower() == ".zip" and part.is_file():
            inner = Path(path).relative_to(part).as_posix()
            return str(part), "" if inner == "." else inner
    return None, ""
