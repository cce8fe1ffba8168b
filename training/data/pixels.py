"""Decode image files of any mode to 8-bit RGB; images in memory."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageOps


def decode(file: IO[bytes], *, exif: bool = False) -> Image.Image:
    """Decode an image of any mode; of an animation, the first picture.

    Args:
        exif: apply the EXIF orientation; COCO's boxes are without it.

    Raises:
        OSError: if the file is not a valid image.
    """
    try:
        opened = Image.open(file)
        # Decode now, while the file is open, to catch errors.
        opened.load()
        if exif:
            opened = ImageOps.exif_transpose(opened)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # PIL's decoders raise any exception for damaged files
        raise OSError(f"{type(error).__name__}: {error}") from error
    return opened


def swaps_sides(content: bytes) -> bool:
    """Return whether the EXIF orientation of an image file swaps its height and width."""
    orientation = decode(io.BytesIO(content)).getexif().get(ExifTags.Base.Orientation)
    return orientation in (5, 6, 7, 8)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as 8-bit RGB; transparency is dropped.

    16-bit pixels are scaled; PIL would clip them.

    Raises:
        OSError: for modes with an unknown range of pixels.
    """
    if image.mode == "RGB":
        return image.copy()
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.int64)
        # PIL also reads 16-bit files as 32-bit ones.
        if pixels.min(initial=0) < 0 or pixels.max(initial=0) > 0xFFFF:
            raise OSError("32-bit pixels: their range is not known")
        image = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise OSError("floating-point pixels: their range is not known")
    elif image.mode in ("P", "PA"):
        # Via RGBA, since PIL warns about palettes with transparency.
        image = image.convert("RGBA")
    return image.convert("RGB")


class ArraySource:
    """Images in memory as a source (see sources.py).

    Args:
        pixels: uint8 [N, H, W].
        targets: integer [N], classes.
        numbers: [N], numbers of the images in the whole data set.
        mode: "L", or "RGB" for models with three channels.
        what: prefix of an image's name, before its number.
    """

    def __init__(
        self, pixels: np.ndarray, targets: np.ndarray, numbers: Sequence, mode: str, what: str
    ) -> None:
        self.pixels, self.targets, self.indices = pixels, targets, numbers
        self.mode, self.what = mode, what

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]).convert(self.mode), int(self.targets[index])

    def name(self, index: int) -> str:
        return f"{self.what} {self.indices[index]}"
