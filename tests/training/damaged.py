"""Image files that are damaged or odd, each in its own way; written in the place of a good one."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def huge(image: Image.Image) -> bytes:
    """A PNG of a few bytes whose header says 60,000 x 60,000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    data = zlib.compress(bytes(10_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def broken_exif(image: Image.Image) -> bytes:
    """A JPEG whose EXIF block is noise; its pixels are whole."""
    noise = b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(range(99))
    content = encoded(image, "JPEG", quality=95)
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(noise) + 2) + noise + content[2:]


def sixteen_bits(image: Image.Image) -> bytes:
    grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
    return encoded(Image.fromarray(grey), "PNG")


# What each makes of an image; those of DAMAGED do not decode, those of ODD do.
DAMAGED = {
    "truncated": lambda image: encoded(image, "PNG")[:-40],
    "wrong magic": lambda image: b"\x89PNK" + encoded(image, "PNG")[4:],
    "zero bytes": lambda image: b"",
    "huge": huge,
    "link to itself": None,
}
ODD = {
    "wrong extension": lambda image: encoded(image, "WEBP", lossless=True),
    "broken EXIF": broken_exif,
    "CMYK": lambda image: encoded(image.convert("CMYK"), "JPEG", quality=95),
    "16 bits": sixteen_bits,
    "animated": lambda image: encoded(
        image, "GIF", save_all=True, append_images=[Image.new("RGB", image.size, "red")]
    ),
}
KINDS = [*DAMAGED, *ODD]


def damage(path: Path, name: str) -> None:
    """Put a damaged or odd image in the place of the good one at ``path``."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    make = {**DAMAGED, **ODD}[name]
    path.unlink()
    if make is None:
        os.symlink(path.name, path)
    else:
        path.write_bytes(make(image))
