"""Images in one folder per class, in a folder or a tar archive.

A class is a direct sub-folder of the split's root; its images may be at any depth. Hidden files and
folders are ignored; other files that are not images of a class are listed in ``left_out``.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from PIL import Image
from timm.utils.misc import natural_key
from torchvision.datasets.folder import IMG_EXTENSIONS

from training.data.pixels import decode, to_rgb
from training.errors import UserError

SPLITS = (("train", "training"), ("validation", "val", "valid", "eval", "evaluation"))


class ClassFolder:
    """The images of a split, as a source (training/data/sources.py).

    Classes are numbered by their names in natural order (2 before 10), or by a class map.

    Args:
        root: the folder with the splits, each a folder or ``SPLIT.tar``; or an archive with the
            folder of the split, or with class folders.
        class_map: text file with one class name per line, in the working directory or the split's
            root; None: no map.
        mode: "RGB" or "L".
        exif: apply the EXIF orientation.

    Raises:
        UserError: if the split or images are missing, a class folder is empty, a link points to a
            parent folder, or the class map does not fit.
    """

    def __init__(
        self, root: str, split: str, class_map: str | None, mode: str, *, exif: bool = False
    ) -> None:
        self.root, self.mode, self.exif = _split_root(Path(root), split), mode, exif
        self.archive = not os.path.isdir(self.root)
        if self.archive:
            found = _inside(_members(self.root), split)
        else:
            found = ((name, (0, 0)) for name in _below(self.root))
        images: list[tuple[str, tuple[int, int]]] = []
        folders: set[str] = set()
        self.left_out: list[str] = []
        for name, place in found:
            parts = PurePosixPath(name).parts
            if len(parts) > 1:
                folders.add(parts[0])
            if len(parts) > 1 and parts[-1].lower().endswith(IMG_EXTENSIONS):
                images.append((name, place))
            elif parts[-1] != "":
                self.left_out.append(self._path(name))
        if not self.archive:
            folders = {e.name for e in os.scandir(self.root) if e.is_dir() and e.name[0] != "."}
        if not images:
            raise UserError(f"no images in {self.root!r}: one folder of images per class is needed")
        if empty := folders - {name.partition("/")[0] for name, _ in images}:
            raise UserError(
                f"class folder without images: {', '.join(map(self._path, sorted(empty)))}; "
                f"remove it or add files ending in {', '.join(IMG_EXTENSIONS)}"
            )
        if class_map is None:
            self.classes: tuple[str, ...] | None = tuple(sorted(folders, key=natural_key))
        else:
            self.classes = read_class_map(class_map, self.root)
            if unknown := sorted(folders - set(self.classes), key=natural_key):
                raise UserError(
                    f"data.class_map: {class_map!r} lacks {', '.join(unknown[:8])}, which "
                    f"{self.root!r} has as folders; it has {', '.join(self.classes[:8])}"
                )
        self._images = sorted(images, key=lambda image: natural_key(self._path(image[0])))
        self._numbers = {name: number for number, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> tuple[Image.Image, int]:
        name, (start, size) = self._images[index]
        # Open the archive in each read: loader processes must not share its file position.
        with open(self.root if self.archive else self._path(name), "rb") as file:
            file.seek(start)
            content = io.BytesIO(file.read(size)) if self.archive else file
            image = to_rgb(decode(content, exif=self.exif))
        target = self._numbers[name.partition("/")[0]]
        return image if self.mode == "RGB" else image.convert(self.mode), target

    def name(self, index: int) -> str:
        return self._path(self._images[index][0])

    def parts(self) -> dict[str, list[str]]:
        """Return the paths of the images by class folder; for an archive, its path."""
        if self.archive:
            return {self.root: [self.root]}
        parts: dict[str, list[str]] = {}
        for name, _ in self._images:
            parts.setdefault(self._path(name.partition("/")[0]), []).append(self._path(name))
        return parts

    def files(self) -> tuple:
        """Return the root and the first and last image, to compare two splits."""
        return self.root, self._images[0], self._images[-1]

    def _path(self, name: str) -> str:
        return os.path.join(self.root, name)


def read_class_map(path: str, root: str = "") -> tuple[str, ...]:
    """Return the class names of a text file with one name per line.

    Args:
        path: path of the file, relative to the working directory or ``root``.

    Raises:
        UserError: if the file is missing or invalid.
    """
    found = next((p for p in (path, os.path.join(root, path)) if os.path.isfile(p)), None)
    if found is None:
        raise UserError(f"data.class_map: {path!r} is not a file")
    try:
        names = [line.strip() for line in Path(found).read_text("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"data.class_map: {path!r} is not UTF-8 text") from error
    for number, name in enumerate(names, start=1):
        if not name:
            raise UserError(f"data.class_map: line {number} of {path!r} is blank: remove it")
        if name in names[: number - 1]:
            raise UserError(f"data.class_map: {path!r} has {name!r} twice")
    return tuple(names)


def _split_root(root: Path, split: str) -> str:
    """Return the folder or archive of a split in ``root``, with one of its usual names."""
    if not root.is_dir():
        return str(root)
    names = _names(split)
    for name in names:
        for path in (root / name, root / f"{name}.tar"):
            if path.exists():
                return str(path)
    raise UserError(
        f"data.root: {str(root)!r} has no folder for the split {split!r}; "
        f"looked for {', '.join(names)}"
    )


def _names(split: str) -> list[str]:
    usual = next((names for names in SPLITS if split in names), ())
    return list(dict.fromkeys((split, *usual)))


def _below(root: str) -> Iterator[str]:
    """Yield the relative paths of all files in a folder, without hidden ones."""
    for parent, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]
        for name in folders:
            _check_link(parent, name)
        inner = os.path.relpath(parent, root)
        for name in files:
            if name[0] != ".":
                yield PurePosixPath(inner, name).as_posix()


def _check_link(parent: str, name: str) -> None:
    """Raise for a link to a parent folder, whose images would repeat."""
    path = os.path.join(parent, name)
    if os.path.islink(path):
        target, inside = os.path.realpath(path), os.path.realpath(parent)
        if os.path.commonpath([target, inside]) == target:
            raise UserError(f"the link {path!r} points to its parent folder {target!r}")


Members = list[tuple[str, tuple[int, int]]]


def _members(path: str) -> Members:
    """Return name, offset and size of each file in an archive; inner archives count as folders."""

    def read(file: tarfile.TarFile, prefix: str, offset: int) -> Iterator[tuple]:
        for member in file:
            name = PurePosixPath(prefix, member.name).as_posix().lstrip("/")
            if not member.isfile() or any(part[0] == "." for part in PurePosixPath(name).parts):
                continue
            start = offset + member.offset_data
            if name.lower().endswith(".tar"):
                with tarfile.open(fileobj=file.extractfile(member), mode="r:") as inner:
                    yield from read(inner, name[: -len(".tar")], start)
            else:
                yield name, (start, member.size)

    try:
        with tarfile.open(path, "r:") as file:  # uncompressed: images are read by their offset
            return list(read(file, "", 0))
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"data.root: cannot open the tar archive {path!r}: {error}") from error


def _inside(members: Members, split: str) -> Members:
    """Return the members of a split's folder; all members if the top folders are classes."""
    tops = {name.partition("/")[0] for name, _ in members if "/" in name}
    usual = {name for names in SPLITS for name in names} | {split, "test"}
    if tops and tops <= usual:  # all names are splits, since a class may be called train
        top = next((name for name in _names(split) if name in tops), None)
        if top is None:
            raise UserError(
                f"data.root: the archive has no folder for the split {split!r} but "
                f"{', '.join(sorted(tops))}"
            )
    elif len(tops) == 1 and all(name.count("/") > 1 for name, _ in members):
        (top,) = tops  # one folder around all class folders
    else:
        return members
    return [(name[len(top) + 1 :], at) for name, at in members if name.startswith(f"{top}/")]
