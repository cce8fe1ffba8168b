"""Look at a torch file before it is loaded: its sizes, its checksums, and what it would build.

torch's own ``weights_only`` runs no code of the file's. But a few bytes can still ask it for any
amount of memory, and it takes an archive whose content was damaged for good.
"""

import os
import pickletools
import re
import zipfile
from pathlib import Path
from typing import IO

# What a state dict is built from; torch itself allows more, as byte arrays of any length.
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
    """A file wants to build something that is not allowed; the message is its name."""


def check_torch_file(path: Path) -> None:
    """Raise for a file that is better not given to ``torch.load``.

    :class:`Refused` names the class it would build; ValueError and others say how it is damaged.
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
        # torch compresses nothing. So an archive that would grow was made to do so.
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
    """Read one pickle without building anything."""
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL":
            name = str(argument).replace(" ", ".", 1)
            if name not in _PLAIN and not _STORAGE_OR_DTYPE.fullmatch(name):
                raise Refused(name)
