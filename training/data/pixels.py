"""Any image file as 8-bit RGB."""

from __future__ import annotations

import io
from typing import IO

import numpy as np
from PIL import Image


def decode_rgb(content: bytes) -> Image.Image:
    """Decode an image file; raises OSError if that fails.

    Grey, palette, CMYK and 16-bit images become RGB, transparency is dropped, the first picture of
    an animation is taken, and an EXIF orientation is not applied: boxes are in pixels as they are
    stored.
    """
    return to_rgb(decode(io.BytesIO(content)))


def decode(file: IO[bytes]) -> Image.Image:
    """Decode an image of any mode; raises OSError if that fails."""
    try:
        opened = Image.open(file)
        # Now, while the file is open and where a damaged one can be caught.
        opened.load()
    except (OSError, MemoryError):  # the latter is the machine's trouble, not the file's
        raise
    except Exception as error:  # PIL's decoders raise whatever a damaged file leads them to
        raise OSError(f"{type(error).__name__}: {error}") from error
    return opened


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB; 16 bits are scaled, where PIL would clip them."""
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
        # By way of RGBA: PIL warns of palettes with transparency otherwise.
        image = image.convert("RGBA")
    return image.convert("RGB")
