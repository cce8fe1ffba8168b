"""Any image file as 8-bit RGB."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def decode_rgb(content: bytes) -> Image.Image:
    """Decode an image file; raises OSError and its kin (``DECODE_ERRORS``) if that fails.

    Grey, palette, CMYK and 16-bit images become RGB, transparency is dropped, and an EXIF
    orientation is not applied: boxes are in pixels as they are stored.
    """
    with Image.open(io.BytesIO(content)) as opened:
        opened.load()
        return to_rgb(opened)


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
