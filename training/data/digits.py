"""The embedded data set: scikit-learn's handwritten digits, with a fixed split.

It has 1,797 scans of 8 x 8 pixels and needs no download. (E. Alpaydin and C. Kaynak, Optical
Recognition of Handwritten Digits, UCI, 1998.)
"""

from __future__ import annotations

import numpy as np

from training.data.pixels import ArraySource

CLASSES = 10


class Digits(ArraySource):
    """Digits as an image source: ``read(index)`` returns an 8 x 8 PIL image and its class.

    Args:
        split: "train" for four fifths, "validation" for the held-out fifth; stratified.
        mode: "L" or "RGB".
    """

    classes: tuple[str, ...] | None = tuple(str(digit) for digit in range(CLASSES))

    def __init__(self, split: str, mode: str = "L") -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, targets = load_digits(return_X_y=True)
        # The split must not depend on the seed of a run.
        options = {"test_size": 0.2, "stratify": targets, "random_state": 0}
        parts = train_test_split(np.arange(len(targets)), **options)
        self.split = split
        chosen = np.sort(parts[0] if split == "train" else parts[1])
        # Pixels are 0 to 16 in the original.
        pixels = np.rint(images[chosen].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        super().__init__(pixels, targets[chosen], chosen, mode, "digit")
