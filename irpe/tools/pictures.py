"""Create and write figures without a screen; shared colours and marks."""

from pathlib import Path
from typing import Any

from ..errors import IrpeError

# Monotonic in lightness, for greyscale printing.
COLOURS = "viridis"


def figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure, in inches, without pyplot and its windows."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def save(made: Any, path: str) -> None:
    """Write a figure in the format of the file's suffix, and print its path."""
    known = made.canvas.get_supported_filetypes()
    if Path(path).suffix.removeprefix(".").lower() not in known:
        raise IrpeError(f"cannot write {path!r}: the name of a picture ends in .png, .svg or .pdf")
    made.savefig(path, bbox_inches="tight")  # do not cut labels at the edges
    print(f"picture: {path}")


def colour_bar(made: Any, image: Any, axes: Any, label: str) -> None:
    """Draw a labelled colour bar beside axes."""
    made.colorbar(image, ax=axes, shrink=0.8, pad=0.02).set_label(label, fontsize=9)


def mark(axes: Any, at: tuple[int, int], thick: float = 1.5) -> None:
    """Draw a frame around the patch at a (row, column): red with a black and a white rim."""
    from matplotlib.patches import Rectangle

    for colour, width in (("white", 3 * thick), ("black", 2.3 * thick), ("red", thick)):
        box = (at[1] - 0.5, at[0] - 0.5)
        axes.add_patch(Rectangle(box, 1, 1, fill=False, ec=colour, lw=width, zorder=3))
