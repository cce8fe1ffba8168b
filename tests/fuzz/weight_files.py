"""Damage weights files in many ways and load each; run by itself, so that a crash is seen.

    python tests/fuzz/weight_files.py FIRST COUNT FOLDER

Prints what became of them as JSON. The number of a file decides all about it.
"""

import argparse
import faulthandler
import io
import json
import pickle
import random
import resource
import struct
import sys
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

import irpe
from irpe import IrpeError
from irpe.files.read import read_weights
from training.errors import UserError

MiB = 2**20


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))


def whole():
    """Content of a file of each format, and the weights in it."""
    weights = {k: v + 1 if v.is_floating_point() else v for k, v in network().state_dict().items()}
    made = {".safetensors": safetensors.torch.save(weights)}
    content = {"model": weights, "args": argparse.Namespace(lr=1e-3, betas=(0.9, 0.99))}
    for suffix, zipped in ((".pth", True), (".pt", False)):
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
        made[suffix] = buffer.getvalue()
    return made, weights


# --- damage to bytes ------------------------------------------------------------------------------


def flipped(content, rng):
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        # Half of the flips near the ends, where headers and directories are.
        span = rng.choice([len(content), min(len(content), 600)])
        at = rng.randrange(span)
        at = len(content) - 1 - at if rng.random() < 0.4 else at
        content[at] ^= 1 << rng.randrange(8)
    return bytes(content)


def cut(content, rng):
    kept = content[: rng.randrange(len(content))]
    return kept + bytes(rng.choice([0, 0, len(content) - len(kept)]))


def spliced(content, rng):
    a, b = sorted(rng.randrange(len(content)) for _ in range(2))
    match rng.randrange(5):
        case 0:
            return content[:a] + content[b:]
        case 1:
            return content[:b] + content[a:]
        case 2:
            return content[:a] + rng.randbytes(b - a) + content[b:]
        case 3:
            return content[b:] + content[:b]
    return content[:a] + bytes(b - a) + content[b:]


def joined(content, rng):
    return rng.choice([content + content, content + rng.randbytes(99), rng.randbytes(40) + content])


# --- headers of safetensors -----------------------------------------------------------------------


def header(content, rng):
    """A safetensors file with a header that was rewritten, its length right or wrong."""
    (length,) = struct.unpack("<Q", content[:8])
    entries, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = rng.choice([key for key in entries if key != "__metadata__"])
    huge = rng.choice([10**13, 2**63 - 1, 2**64, 10**30, -1, 0, 1.5, None, "3"])
    match rng.randrange(9):
        case 0:
            entries[name]["shape"] = [huge]
        case 1:
            entries[name]["shape"] = [2**32, 2**32]
        case 2:
            entries[name]["data_offsets"] = [0, huge]
        case 3:
            entries[name]["data_offsets"] = [huge, huge]
        case 4:
            entries[name]["dtype"] = rng.choice(["F64", "I32", "BF16", "F8_E4M3", "Q9", "", 7])
        case 5:
            entries[rng.choice(["", "\0", "\ud800", "__metadata__", name * 9])] = entries.pop(name)
        case 6:
            entries["__metadata__"] = rng.choice([3, {"a": 1}, [], {"a": "b" * 10**5}])
        case 7:
            entries = rng.choice([[], 3, None, {}, {"a": []}])
        case 8:
            return struct.pack("<Q", rng.choice([10**13, 2**63, 2**64 - 1, 0, 7])) + content[8:]
    text = json.dumps(entries).encode()
    if rng.random() < 0.2:
        text = b"[" * rng.choice([100, 100_000]) + text
    return struct.pack("<Q", len(text)) + text + data


# --- archives and pickles of torch ----------------------------------------------------------------


def archive(content, rng):
    """Rewrite the members of a torch archive: packed, doubled, renamed, left out."""
    made = io.BytesIO()
    trick = rng.choice(["packed", "bomb", "doubled", "renamed", "short", "directory", "pickle"])
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        members = old.infolist()
        chosen = rng.choice(members).filename
        for member in members:
            name, data, kind = member.filename, old.read(member), zipfile.ZIP_STORED
            if trick == "packed":
                kind = zipfile.ZIP_DEFLATED
            elif trick == "bomb" and "/data/" in name:
                kind, data = zipfile.ZIP_DEFLATED, bytes(64 * MiB)
            elif trick == "pickle" and name.endswith(".pkl"):
                data = opcodes(data, rng)
            elif trick == "short" and name == chosen:
                data = data[: rng.randrange(len(data) + 1)]
            elif trick == "renamed" and name == chosen:
                name = rng.choice(["../" * 5 + name, "x", "/etc/x", name.upper(), name + "\0"])
            if not (trick == "directory" and name == chosen):
                new.writestr(name, data, kind)
            if trick == "doubled" and name == chosen:
                new.writestr(name, rng.choice([data, bytes(len(data))]), kind)
    return made.getvalue()


def sized(content, rng):
    """A torch archive whose directory declares terabytes."""
    content = bytearray(content)
    places = [i for i in range(len(content) - 4) if content[i : i + 4] == b"PK\1\2"]
    at = rng.choice(places)
    size = rng.choice([2**32 - 2, 2**31, 0, len(content) * 2])
    content[at + 24 : at + 28] = struct.pack("<I", size)
    if rng.random() < 0.5:
        content[at + 20 : at + 24] = struct.pack("<I", size)
    return bytes(content)


def opcodes(content, rng):
    """A pickle: one of the bombs, or the whole one with opcodes put in."""
    call = b"R"
    bombs = [
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + struct.pack("<Q", 10**13)[:6] + b"\x85R.",
        b"\x80\x02cposix\nsystem\nX\x04\0\0\0true\x85R.",
        b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n(K\x00K\x01t" + call + b".",
        b"\x80\x02" + b"(" * 50_000 + b"t" * 50_000 + b".",
        b"\x80\x02" + b"]" + b"\x85" * 100_000 + b".",
        b"\x80\x02X\xff\xff\xff\xffabc.",
        b"\x80\x04\x8e" + struct.pack("<Q", 10**13) + b"abc.",
        b"\x80\x02]q\x00h\x00a.",
        b"\x80\x02}q\x00X\x05\0\0\0modelh\x00s.",
        b"\x80\x02\x8a\xff" + bytes(255) + b".",
        b"\x80\x02j\xff\xff\xff\xff.",
        b"\x80\x02ctorch\nFloatStorage\n)R.",
        b"\x80\x02cargparse\nNamespace\n)\x81}X\x09\0\0\0__class__K\x01sb.",
        b".",
        b"",
    ]
    if rng.random() < 0.6:
        return rng.choice(bombs)
    at = rng.randrange(len(content))
    return content[:at] + rng.randbytes(rng.choice([1, 2, 5])) + content[at + 1 :]


def legacy(content, rng):
    """A file of the old format with other numbers in it: sizes, strides, offsets."""
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    if rng.random() < 0.4:
        return magic + pickle.dumps({"little_endian": True}, 2) + opcodes(content, rng)
    content = bytearray(content)
    places = [i for i in range(len(content) - 6) if content[i] in b"KMJ\x8a"]
    for _ in range(rng.randrange(1, 4)):
        at = rng.choice(places)
        number = struct.pack("<i", rng.choice([2**31 - 1, -1, -(2**31), 10**9]))
        content[at : at + 5] = b"J" + number
    return bytes(content)


ANY = (flipped, flipped, cut, spliced, joined)
WAYS = {
    ".safetensors": (*ANY, header, header, header),
    ".pth": (*ANY, archive, archive, archive, sized),
    ".pt": (*ANY, legacy, legacy),
}


# --- loading --------------------------------------------------------------------------------------


def attempt(number, folder, files, weights):
    """Damage a file and load it; return what became of it, or raise AssertionError."""
    rng = random.Random(number)
    suffix = rng.choice(sorted(files))
    way = rng.choice(WAYS[suffix])
    path = folder / f"damaged{suffix}"
    path.write_bytes(way(files[suffix], rng))
    model, before = network(), network().state_dict()
    try:
        found = read_weights(path)
        irpe.load(model, path)
    except (IrpeError, UserError) as error:
        assert "\n" not in str(error), str(error)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "torn"
        return f"{suffix} {way.__name__}: refused"
    after = model.state_dict()
    for name, value in after.items():
        held = found[name].to(value.dtype)
        assert torch.equal(value.nan_to_num(), held.nan_to_num()), f"{name} is not the file's"
    # An archive has checksums. Other formats have none: numbers changed in place pass.
    if suffix == ".pth":
        assert all(torch.equal(after[name], weights[name]) for name in weights), "wrong numbers"
    return f"{suffix} {way.__name__}: loaded"


def main(first, count, folder):
    faulthandler.enable()
    warnings.simplefilter("ignore")
    files, weights = whole()
    for suffix, content in files.items():  # what is not damaged is read
        (folder / f"whole{suffix}").write_bytes(content)
        assert all(
            torch.equal(v, weights[k]) for k, v in read_weights(folder / f"whole{suffix}").items()
        )
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = Counter()
    for number in range(first, first + count):
        print(number, file=sys.stderr, flush=True)  # the last one, where the process dies
        outcomes[attempt(number, folder, files, weights)] += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024
    print(json.dumps({"outcomes": outcomes, "grown_MiB": grown}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
