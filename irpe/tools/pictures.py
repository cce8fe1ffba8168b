"""Figures that need no screen, and how they are written: what all pictures share."""

from pathlib import Path
from typing import Any

from ..errors import IrpeError

# From dark to light without a turn, so that a picture in grey says the same.
COLOURS = "viridis"


def figure(width: float, height: float) -> Any:
    """A matplotlib figure of a size in inches, made without pyplot and its windows."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def save(made: Any, path: str) -> None:
    """Write a figure in the format that the file's name says, and print where it is.

    Raises:
        IrpeError: for an ending that matplotlib has no format for.
    """
    known = made.canvas.get_supported_filetypes()
    if Path(path).suffix.removeprefix(".").lower() not in known:
        raise IrpeError(f"cannot draw {path!r}: a picture's name ends in .png, .svg or .pdf")
    made.savefig(path, bbox_inches="tight")  # labels at the edges whole
    print(f"picture: {path}")


def colour_bar(made: Any, image: Any, axes: Any, label: str) -> None:
    """A colour bar beside axes, that says what its numbers are."""
    made.colorbar(image, ax=axes, shrink=0.8, pad=0.02).set_label(label, fontsize=9)


def mark(axes: Any, at: tuple[int, int], thick: float = 1.5) -> None:
    """A frame around the patch at a (row, column): red in black and white, seen on any colour."""
    from matplotlib.patches import Rectangle

    for colour, width in (("white", 3 * thick), ("black", 2.3 * thick), ("red", thick)):
        box = (at[1] - 0.5, at[0] - 0.5)
        axes.add_patch(Rectangle(box, 1, 1, fill=False, ec=colour, lw=width, zorder=3))
