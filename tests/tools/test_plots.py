"""What is drawn and printed are the buckets: read back from the axes, and compared with loops."""

import re

import numpy as np
import pytest
from oracles import buckets as plain
from oracles import text as plain_text

import irpe
from irpe.tools.command import main
from irpe.tools.pictures import figure
from irpe.tools.plots import plot_bucket_row, plot_buckets
from irpe.tools.terminal import number_map

SPECS = [
    "rpe-1.9-product-ctx-1-k",
    "rpe-2.0-cross-ctx-1-k",
    "rpe-20.0-euc-ctx-1-k",
    "rpe-33.0-quant-bias-0-k",
    "rpe-33.0-rank-ctx-1-k",
]


def by_loops(spec, height, width, at):
    """For each patch a tuple of bucket ids, one or for method cross two."""
    functions = plain.buckets(irpe.parse(spec))
    return [
        [tuple(f(at[0] - y, at[1] - x) for f in functions) for x in range(width)]
        for y in range(height)
    ]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("size", "at"), [((14, 14), (7, 7)), ((5, 8), (1, 6))], ids=str)
def test_a_drawn_map(spec, size, at):
    axes = figure(4, 4).subplots()
    plot_buckets(spec, irpe.Grid(*size, prefix=1), at, axes)
    wanted = by_loops(spec, *size, at)
    drawn = {t.get_position(): t.get_text() for t in axes.texts}
    assert len(drawn) == size[0] * size[1]
    for (x, y), text in drawn.items():
        assert tuple(map(int, text.splitlines())) == wanted[y][x]
    # One colour for each bucket, and none for two.
    (image,) = axes.images
    colours = [[tuple(c) for c in row] for row in image.to_rgba(image.get_array())]
    pairs = {(wanted[y][x], colours[y][x]) for y in range(size[0]) for x in range(size[1])}
    assert len(pairs) == len({p[0] for p in pairs}) == len({p[1] for p in pairs})
    assert f"{len(pairs)} buckets" in axes.get_title()
    frame = axes.patches[-1]
    assert frame.get_xy() == (at[1] - 0.5, at[0] - 0.5)


def test_a_large_map_has_a_colour_bar_for_numbers(tmp_path):
    """And no pairs of all patches with all others: 40,000 of them would not fit into memory."""
    figures = figure(4, 4)
    axes = figures.subplots()
    plot_buckets(SPECS[0], irpe.Grid(200, 200), (150, 20), axes)
    assert not axes.texts and len(figures.axes) == 2 and "bucket" in figures.axes[1].get_ylabel()
    assert main(["buckets", SPECS[1], "--grid", "3x400", "--out", str(tmp_path / "a.png")]) == 0
    assert main(["buckets", "t5", "--length", "100000"]) == 0


def test_lines_stand_between_buckets():
    axes = figure(4, 4).subplots()
    plot_buckets(SPECS[0], irpe.Grid(6, 9), (3, 3), axes)
    ids = by_loops(SPECS[0], 6, 9, (3, 3))
    across = {(x, y) for y in range(5) for x in range(9) if ids[y][x] != ids[y + 1][x]}
    down = {(x, y) for y in range(6) for x in range(8) if ids[y][x] != ids[y][x + 1]}
    flat, upright = axes.collections
    assert {(s[0][0] + 0.5, s[0][1] - 0.5) for s in flat.get_segments()} == across
    assert {(s[0][0] - 0.5, s[0][1] + 0.5) for s in upright.get_segments()} == down


@pytest.mark.parametrize("spec", SPECS)
def test_a_printed_map(spec, capsys):
    assert main(["buckets", spec, "--grid", "6x9", "--at", "2,5"]) == 0
    out = capsys.readouterr().out.splitlines()
    rows = [line for line in out if re.fullmatch(r"[ \d\[\]]+", line)]
    wanted = by_loops(spec, 6, 9, (2, 5))
    maps = len(wanted[0][0])
    assert len(rows) == 6 * maps
    for n in range(maps):
        for y, line in enumerate(rows[6 * n : 6 * n + 6]):
            found = list(map(int, re.findall(r"\d+", line)))
            assert found == [ids[n] for ids in wanted[y]]
            assert re.findall(r"\[ *(\d+)\]", line) == ([str(found[5])] if y == 2 else [])


@pytest.mark.parametrize(
    ("width", "at"), [(26, 0), (27, 26), (39, 20), (40, 3), (79, 7), (300, 250)]
)
def test_maps_of_any_width_fit(width, at):
    rows = [[(y * width + x) % 100 for x in range(width)] for y in range(3)]
    lines = number_map(rows, (1, at))
    assert max(map(len, lines)) <= 79
    mark = lines[1].index("[") if "[" in lines[1] else lines[1].index("*")
    if width == 26:
        assert mark == 0 and len(lines) == 3
    elif width <= 39:
        assert mark == 2 * at and len(lines) == 4
    else:
        first = int(re.match(r"columns (\d+)", lines[3])[1]) if width > 79 else 0
        assert first + mark == at


TEXTS = {
    "t5,buckets=32,max=128": lambda d: plain_text.t5_bucket(d, 32, 128, True),
    "shaw,clip=5": lambda d: plain_text.clip(d, 5) + 5,
    "huang1,clip=5": lambda d: abs(plain_text.clip(d, 5)),
}


@pytest.mark.parametrize(("spec", "function"), TEXTS.items(), ids=TEXTS)
def test_a_row_of_a_text(spec, function, capsys):
    wanted = [function(20 - j) for j in range(50)]
    axes = figure(4, 4).subplots()
    plot_bucket_row(spec, 50, 20, axes)
    for line in axes.lines[:2]:
        assert line.get_xdata().tolist() == list(range(-20, 30))
        assert line.get_ydata().tolist() == wanted
    assert main(["buckets", spec, "--length", "50", "--at", "20"]) == 0
    out = capsys.readouterr().out
    found = []
    for first, last, bucket in re.findall(r"^([+-]\d+)(?: to ([+-]\d+))? +(\d+)$", out, re.M):
        assert int(first) == len(found) - 20
        found += [int(bucket)] * (int(last or first) - int(first) + 1)
    assert found == wanted


@pytest.mark.parametrize("spec", [SPECS[1], "t5"])
def test_pictures_are_written(spec, tmp_path, capsys):
    from PIL import Image

    path = tmp_path / "a.png"
    assert main(["buckets", spec, "--out", str(path)]) == 0
    assert f"picture: {path}" in capsys.readouterr().out
    with Image.open(path) as image:
        assert image.width > 400 and len(np.unique(np.asarray(image.convert("L")))) > 20
