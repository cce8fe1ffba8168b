"""The embedded data set: scikit-learn's handwritten digits, with a fixed split.

1,797 scans of 8 x 8 pixels that come inside scikit-learn, so that a first run needs no download.
(E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.)
"""

from __future__ import annotations

import numpy as np
from PIL import Image

CLASSES = 10
HELD_OUT = 0.2
# Of the training part; what the images are normalised with unless the config says otherwise.
MEAN, STD = (0.305,), (0.376,)
# The split belongs to the data set: it must not move with the seed of a run.
_SPLIT_SEED = 0


class Digits:
    """Digits as an image source: ``read(index)`` gives an 8 x 8 grey PIL image and its class.

    Args:
        split: "train" for four fifths, "validation" for the held-out fifth; stratified.
    """

    classes: tuple[str, ...] | None = tuple(str(digit) for digit in range(CLASSES))

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, targets = load_digits(return_X_y=True)
        parts = train_test_split(
            np.arange(len(targets)),
            test_size=HELD_OUT,
            stratify=targets,
            random_state=_SPLIT_SEED,
        )
        self.split = split
        self.indices = np.sort(parts[0] if split == "train" else parts[1])
        pixels = images[self.indices].reshape(-1, 8, 8)
        # Ink is counted from 0 to 16 in the original; PIL wants bytes.
        self._pixels = np.rint(pixels * (255 / 16)).astype(np.uint8)
        self._targets = targets[self.indices].astype(int)

    def __len__(self) -> int:
        return len(self._targets)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._pixels[index]), int(self._targets[index])

    def name(self, index: int) -> str:
        return f"digit {self.indices[index]}"
