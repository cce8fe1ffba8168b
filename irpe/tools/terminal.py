"""Maps and tables as text that fits a terminal of 80 columns."""

import string
from collections.abc import Sequence

WIDTH = 79
_LETTERS = string.digits + string.ascii_letters


def number_map(rows: Sequence[Sequence[int]], at: tuple[int, int]) -> list[str]:
    """Return the lines of a map of small integers, with brackets around the (row, column) ``at``.

    If numbers do not fit, each is one letter or digit, and a last line has the key. If these do not
    fit either, the map has the columns around ``at``, which is a star.
    """
    columns, digits = len(rows[0]), max(len(str(n)) for row in rows for n in row)
    if columns * (digits + 1) + 1 <= WIDTH:
        return _spaced([[f"{n:>{digits}}" for n in row] for row in rows], at)
    key = "0 to 9, a to z: 10 to 35, A to Z: 36 to 61, and so on from 0"
    if 2 * columns + 1 <= WIDTH:
        return [*_spaced([[_LETTERS[n % 62] for n in row] for row in rows], at), key]
    shown = min(columns, WIDTH)
    first = min(max(at[1] - shown // 2, 0), columns - shown)
    cells = [[_LETTERS[n % 62] for n in row[first : first + shown]] for row in rows]
    cells[at[0]][at[1] - first] = "*"
    if shown < columns:
        key = f"columns {first} to {first + shown - 1}\n{key}"
    return [*map("".join, cells), *key.splitlines()]


def _spaced(cells: list[list[str]], at: tuple[int, int]) -> list[str]:
    lines = [" " + " ".join(row) for row in cells]
    wide = len(cells[0][0])
    start = at[1] * (wide + 1)
    line = lines[at[0]]
    lines[at[0]] = f"{line[:start]}[{cells[at[0]][at[1]]}]{line[start + wide + 2 :]}"
    return lines


def table(rows: Sequence[Sequence[object]], left: int = 1) -> list[str]:
    """Return the lines of a table; the first row is its head. ``left``: left-aligned columns."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    forms = [f"{{:{'<' if n < left else '>'}{width}}}" for n, width in enumerate(widths)]
    head, *body = ("  ".join(forms).format(*row).rstrip() for row in texts)
    return [head, "-" * sum(widths, 2 * len(widths) - 2), *body]
