"""Check a torch file before it is loaded: sizes, checksums, and the classes it builds.

torch's ``weights_only`` runs no code of the file. But a small file can make it allocate any amount
of memory, and it accepts damaged archives.
"""

import os
import pickletools
import re
import zipfile
from pathlib import Path
from typing import IO

# Allowed classes; torch allows more, such as byte arrays of any length.
_PLAIN = {
    "argparse.Namespace",
    "builtins.set",
    "collections.Counter",
    "collections.OrderedDict",
    "torch.Size",
    "torch.device",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
    "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout",
}
_STORAGE_OR_DTYPE = re.compile(r"torch\.(storage\.)?([A-Z][A-Za-z0-9]*Storage|b?float\w+|u?int\w+)")
_LEGACY_PICKLES = 5  # magic number, version, byte order, content, names of storages


class Refused(Exception):
    """A file builds a class that is not allowed; the message is its name."""


def check_torch_file(path: Path) -> None:
    """Raise if ``torch.load`` should not read a file.

    Raises:
        Refused: if it builds another class; the message is its name.
        Exception: ValueError and others, if the file is damaged.
    """
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            _check_archive(path)
            return
        file.seek(0)
        for _ in range(_LEGACY_PICKLES):
            _check_pickle(file)


def _check_archive(path: Path) -> None:
    size = os.path.getsize(path)
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        names = {member.filename for member in members}
        # torch does not compress.
        packed = any(m.compress_type or m.compress_size != m.file_size for m in members)
        if packed or len(names) < len(members) or sum(m.file_size for m in members) > size:
            raise ValueError("its archive was not written by torch")
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged!r} in it does not have its checksum")
        for name in names:
            if name.endswith(".pkl"):
                with archive.open(name) as file:
                    _check_pickle(file)


def _check_pickle(file: IO[bytes]) -> None:
    """Check the classes of one pickle without building objects."""
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL":
            name = str(argument).replace(" ", ".", 1)
            if name not in _PLAIN and not _STORAGE_OR_DTYPE.fullmatch(name):
                raise Refused(name)
