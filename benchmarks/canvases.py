"""Canvases with a handwritten digit: enlarged, shifted, with a fragment of another one under it.

Scans of scikit-learn's digits, 8 x 8 pixels, enlarged to nearly the canvas's height. A digit is
made up by where its parts are to each other, and it may stand further left, right, up or down.
"""

import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.data.digits import Digits
from training.data.painting import glyph
from training.seeding import derive

SIDE = 12  # pixels of a canvas
HEIGHTS = (10, 12)  # of a digit, least and most
PIECE = 3  # side of the fragment
Data = tuple[Tensor, Tensor]


def canvases(split: str, count: int, seed: int, scale: int = 1) -> Data:
    """Canvases ``[count, 1, side, side]`` from 0 to 1, and the classes ``[count]`` of their digits.

    Args:
        split: of the scans: "train", or "validation", whose scans no training ever sees.
        scale: paints all this many times as large.
    """
    rng = np.random.default_rng(derive(seed, split))
    scans, side = len(_source(split)), SIDE * scale
    images = np.zeros((count, side, side), np.float32)
    chosen = rng.integers(scans, size=(count, 2)).tolist()
    heights = scale * rng.integers(HEIGHTS[0], HEIGHTS[1] + 1, size=(count, 2))
    places = rng.random((count, 6))
    for image, (scan, other), (tall, high), at in zip(
        images, chosen, heights.tolist(), places, strict=True
    ):
        digit = _glyph(split, scan, tall)
        _put(image, _cut(_glyph(split, other, high), at[:2], PIECE * scale), at[2:4])
        _put(image, digit, at[4:])
    classes = torch.tensor([_source(split).read(scan)[1] for scan, _ in chosen])
    return torch.from_numpy(images).unsqueeze(1), classes


def resized(images: Tensor, side: int) -> Tensor:
    """The same canvases at another resolution, as image loaders resize."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)


def widened(images: Tensor, height: int, width: int, seed: int) -> Tensor:
    """The same canvases, each somewhere on an empty rectangle that is larger."""
    count, _, *own = images.shape
    rng = np.random.default_rng(derive(seed, height, width))
    ends = [rng.integers(0, n - m + 1, count) for n, m in zip((height, width), own, strict=True)]
    wide = images.new_zeros(count, 1, height, width)
    for there, image, y, x in zip(wide, images, *ends, strict=True):
        there[:, y : y + own[0], x : x + own[1]] = image
    return wide


@cache
def _source(split: str) -> Digits:
    return Digits(split)


@cache
def _glyph(split: str, scan: int, height: int) -> np.ndarray:
    return glyph(_source(split).read(scan)[0], height).astype(np.float32)


def _cut(digit: np.ndarray, at: np.ndarray, side: int) -> np.ndarray:
    y, x = (int(f * (max(n - side, 0) + 1)) for f, n in zip(at, digit.shape, strict=True))
    return digit[y : y + side, x : x + side]


def _put(image: np.ndarray, alpha: np.ndarray, at: np.ndarray) -> None:
    """Paint over what is there, at a place given as a share of the room there is."""
    y, x = (int(f * (n - m + 1)) for f, n, m in zip(at, image.shape, alpha.shape, strict=True))
    under = image[y : y + alpha.shape[0], x : x + alpha.shape[1]]
    under += alpha * (1 - under)
