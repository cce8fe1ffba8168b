"""Image files of every mode as 8-bit RGB."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data.pixels import decode, to_rgb


def decode_rgb(content: bytes) -> Image.Image:
    return to_rgb(decode(io.BytesIO(content)))


def encoded(image: Image.Image, path: Path, **options) -> bytes:
    image.save(path, **options)
    return path.read_bytes()


def pixels_of(content: bytes) -> np.ndarray:
    image = decode_rgb(content)
    assert image.mode == "RGB"
    return np.asarray(image)


def ramp(top: int, dtype) -> np.ndarray:
    return np.linspace(0, top, 35).round().astype(dtype).reshape(5, 7)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bits_are_scaled(tmp_path: Path, name: str):
    values = ramp(65535, np.uint16)
    found = pixels_of(encoded(Image.fromarray(values), tmp_path / name))
    expected = [[int(value / 257 + 0.5) for value in row] for row in values.tolist()]
    assert (found == np.array(expected)[..., None]).all()
    assert (found.min(), found.max()) == (0, 255)


def test_16_bits_that_pil_reads_as_32(tmp_path: Path):
    values = ramp(65535, np.int32)
    found = pixels_of(encoded(Image.fromarray(values), tmp_path / "a.tif"))
    assert (found.min(), found.max()) == (0, 255)
    for bad in (values * 2, values - 1, values.astype(np.float32)):
        with pytest.raises(OSError, match="range is not known"):
            decode_rgb(encoded(Image.fromarray(bad), tmp_path / "a.tif"))


def test_modes(tmp_path: Path):
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
    alpha = rng.integers(0, 256, (6, 5, 1), dtype=np.uint8)
    grey = colour[..., 0]
    image = Image.fromarray(colour)
    twelve_colours = image.quantize(12)
    transparent = twelve_colours.copy()
    transparent.info["transparency"] = bytes(range(0, 120, 10))
    cases = [
        (image, {}, colour),
        (Image.fromarray(grey), {}, np.stack([grey] * 3, -1)),
        (Image.fromarray(grey > 127), {}, np.stack([(grey > 127) * np.uint8(255)] * 3, -1)),
        (Image.fromarray(np.concatenate((colour, alpha), -1)), {}, colour),
        (Image.fromarray(np.stack((grey, alpha[..., 0]), -1)), {}, np.stack([grey] * 3, -1)),
        (twelve_colours, {}, np.asarray(twelve_colours.convert("RGB"))),
        (transparent, {}, np.asarray(twelve_colours.convert("RGB"))),
    ]
    for case, options, expected in cases:
        found = pixels_of(encoded(case, tmp_path / "a.png", **options))
        assert (found == expected).all(), case.mode


def test_cmyk(tmp_path: Path):
    cyan, black = (255, 0, 0, 0), (0, 0, 0, 255)
    image = Image.new("CMYK", (16, 8), cyan)
    image.paste(black, (8, 0, 16, 8))
    for name in ("a.jpg", "a.tif"):
        found = pixels_of(encoded(image, tmp_path / name)).astype(int)
        assert abs(found[:, :8] - (0, 255, 255)).max() <= 6
        assert found[:, 8:].max() <= 6
