"""Fashion-MNIST: 60,000 + 10,000 grey images of clothes, 28 x 28 pixels, ten classes.

H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST, 2017 (arXiv 1708.07747); MIT licence. The four IDX
files come from Debian's package ``dataset-fashion-mnist`` or torchvision's download.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

from training.data.pixels import ArraySource
from training.errors import UserError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
NAMES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip
COUNTS = {"train": 60_000, "t10k": 10_000}
SPLITS = {
    "train": ("train", 0, 50_000),
    "validation": ("train", 50_000, 60_000),
    "train+validation": ("train", 0, 60_000),
    "test": ("t10k", 0, 10_000),
}


class Fashion(ArraySource):
    """Fashion-MNIST as an image source: ``read(index)`` returns a PIL image and its class.

    Args:
        split: "train" for the first 50,000 training images, "validation" for the last 10,000,
            "train+validation" for both, "test" for the 10,000 test images.
        mode: "L" or "RGB".
        root: folder of the IDX files, or of torchvision's download; None: Debian's.
        download: whether torchvision downloads missing files into ``root``.

    Raises:
        UserError: if the split is unknown, files are missing or damaged, or the download fails.
    """

    classes: tuple[str, ...] | None = NAMES

    def __init__(
        self, split: str, mode: str = "L", root: str | None = None, *, download: bool = False
    ) -> None:
        if split not in SPLITS:
            raise UserError(f"fashion has no split {split!r}; valid: {', '.join(SPLITS)}")
        part, first, end = SPLITS[split]
        self.folder = _find(root, download=download)
        pixels, targets = (
            _read_idx(self.folder, part, kind, shape)[first:end]
            for kind, shape in (("images-idx3", (28, 28)), ("labels-idx1", ()))
        )
        super().__init__(pixels, targets, range(first, end), mode, f"{self.folder} {part} image")


def _find(root: str | None, *, download: bool) -> Path:
    """Return the folder of the IDX files."""
    if root is not None and download:
        from torchvision.datasets import FashionMNIST

        try:
            FashionMNIST(root, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(f"fashion: the download into {root!r} failed: {error}") from error
    places = [Path(root), Path(root) / "FashionMNIST" / "raw"] if root is not None else [DEBIAN]
    for place in places:
        if any(place.glob("train-images-idx3-ubyte*")):
            return place
    looked = " or ".join(map(str, places))
    raise UserError(
        f"fashion: no train-images-idx3-ubyte(.gz) in {looked}. On Debian and Ubuntu: "
        "apt install dataset-fashion-mnist, without data.root; elsewhere torchvision downloads "
        "30 MB: --data.root FOLDER --data.download true"
    )


def _read_idx(folder: Path, part: str, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the bytes [N, *shape] of an IDX file, after checking its header."""
    path = folder / f"{part}-{kind}-ubyte"
    path = path if path.exists() else path.with_name(f"{path.name}.gz")
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"fashion: cannot read {path}: {error}") from error
    sizes = (COUNTS[part], *shape)
    header = np.array([0x800 + len(sizes), *sizes], ">i4").tobytes()
    if not content.startswith(header) or len(content) != len(header) + np.prod(sizes):
        raise UserError(f"fashion: {path} is damaged: it should have {sizes} bytes")
    return np.frombuffer(content, np.uint8, offset=len(header)).reshape(sizes)
