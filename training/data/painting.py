"""Paint scenes: digits over smooth noise, fragments of digits and strokes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

# Minimum opacity of the pixels of a digit; boxes are around these pixels.
INK = 0.25
# Ink up to _PALE becomes transparent, from _PALE + _SLOPE opaque.
_PALE, _SLOPE = 0.35, 0.4
# Minimum difference in brightness between a digit and its background, of 255.
_CONTRAST = 80
# Maximum overlap of two digits' boxes, as a fraction of the smaller box.
_OVERLAP = 0.2
_TRIES = 60
_BRIGHTNESS = np.array((0.299, 0.587, 0.114))


@dataclass(frozen=True)
class Placed:
    """A digit in a scene: number of the scan, class, opacity [h, w] and upper left corner."""

    scan: int
    digit: int
    alpha: np.ndarray
    left: int
    top: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """x, y, width, height in pixels."""
        height, width = self.alpha.shape
        return self.left, self.top, width, height


def glyph(scan: Image.Image, height: int) -> np.ndarray:
    """Return the opacity, float [h, w], of a digit about ``height`` pixels high, cropped to ink."""
    # Crop to the pixels that are ink after the next steps, so that the height stays.
    ink = _cut(np.asarray(scan), 255 * (_PALE + INK * _SLOPE))
    width = max(1, round(height * ink.shape[1] / ink.shape[0]))
    grown = Image.fromarray(ink).resize((width, height), Image.Resampling.BICUBIC)
    # Make edges steeper after interpolation, so that strokes are solid and holes are open.
    return _cut(np.clip((np.asarray(grown) / 255.0 - _PALE) / _SLOPE, 0, 1), INK)


def place_digits(
    rng: np.random.Generator,
    digits: list[tuple[int, int, Image.Image]],
    size: int,
    heights: tuple[int, int],
) -> list[Placed]:
    """Find positions for digits (scan, class, image); those without space are left out."""
    placed: list[Placed] = []
    for scan, digit, image in digits:
        for _ in range(_TRIES):
            alpha = glyph(image, int(rng.integers(heights[0], heights[1] + 1)))
            rows, columns = (size - side for side in alpha.shape)
            if rows < 0 or columns < 0:
                continue
            left, top = int(rng.integers(columns + 1)), int(rng.integers(rows + 1))
            candidate = Placed(scan, digit, alpha, left, top)
            if all(overlap(candidate.box, other.box) <= _OVERLAP for other in placed):
                placed.append(candidate)
                break
    return placed


def background(
    rng: np.random.Generator, size: int, clutter: int, fragments: list[Image.Image]
) -> np.ndarray:
    """Return smooth noise with strokes and parts of ``fragments``, float [size, size, 3]."""
    cells = int(rng.integers(2, 7))
    noise = rng.normal(rng.uniform(20, 90), rng.uniform(8, 35), (cells, cells, 3))
    noise = Image.fromarray(np.uint8(np.clip(noise, 0, 255)))
    canvas = np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)
    for number in range(int(rng.integers(clutter + 1))):
        colour, opacity = rng.uniform(0, 200, 3), rng.uniform(0.3, 0.8)
        if number % 2 and fragments:
            whole = glyph(fragments[number % len(fragments)], int(rng.integers(10, 29)))
            alpha = _part(rng, whole)
            left, top = (int(rng.integers(-4, size - 3)) for _ in range(2))
        else:
            alpha, left, top = _stroke(rng, size), 0, 0
        canvas = _over(canvas, alpha * opacity, left, top, colour)
    return canvas + rng.normal(0, rng.uniform(0, 8), canvas.shape)


def paint(rng: np.random.Generator, canvas: np.ndarray, placed: list[Placed]) -> Image.Image:
    """Paint digits on a canvas, each in a light colour with enough contrast."""
    for item in placed:
        left, top, width, height = item.box
        under = canvas[top : top + height, left : left + width]
        brightness = float((under @ _BRIGHTNESS).mean())
        colour = rng.uniform(130, 255, 3)
        lighter = min(255.0, brightness + _CONTRAST)
        lack = lighter - float(colour @ _BRIGHTNESS)
        if lack > 0:  # move towards white
            colour += (255 - colour) * lack / (255 - float(colour @ _BRIGHTNESS))
        canvas = _over(canvas, item.alpha, left, top, colour)
    return Image.fromarray(np.uint8(np.clip(np.rint(canvas), 0, 255)))


def _cut(alpha: np.ndarray, least: float) -> np.ndarray:
    """Crop a digit to its ink, the pixels of at least ``least``."""
    ink = alpha >= least
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _part(rng: np.random.Generator, alpha: np.ndarray) -> np.ndarray:
    """Keep less than half of a digit, on one side of a slanted line."""
    height, width = alpha.shape
    y, x = np.mgrid[0.5:height, 0.5:width]
    angle = rng.uniform(0, 2 * np.pi)
    across = (y / height - 0.5) * np.sin(angle) + (x / width - 0.5) * np.cos(angle)
    return alpha * (across > rng.uniform(0.05, 0.2))


def _stroke(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return a thin line or arc across a scene, downscaled for smooth edges."""
    finer = 3
    sheet = Image.new("L", (size * finer,) * 2)
    draw = ImageDraw.Draw(sheet)
    ends = rng.uniform(-0.2, 1.2, 4) * size * finer
    thick = int(rng.integers(2, 6))
    if rng.random() < 0.5:
        draw.line(ends.tolist(), fill=255, width=thick)
    else:
        x, y = np.sort(ends[:2]), np.sort(ends[2:])
        start = rng.uniform(0, 360)
        corners = [x[0], y[0], x[1] + 1, y[1] + 1]
        draw.arc(corners, start, start + rng.uniform(60, 240), fill=255, width=thick)
    return np.asarray(sheet.resize((size, size), Image.Resampling.BOX)) / 255.0


def _over(
    canvas: np.ndarray, alpha: np.ndarray, left: int, top: int, colour: np.ndarray
) -> np.ndarray:
    """Blend a colour over a canvas, and clip it at the edges."""
    x, y = max(left, 0), max(top, 0)
    alpha = alpha[y - top :, x - left :]
    alpha = alpha[: canvas.shape[0] - y, : canvas.shape[1] - x, None]
    canvas = canvas.copy()
    under = canvas[y : y + alpha.shape[0], x : x + alpha.shape[1]]
    under += alpha * (colour - under)
    return canvas


def overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Return the intersection of two boxes over the area of the smaller one."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0) / min(a[2] * a[3], b[2] * b[3])
