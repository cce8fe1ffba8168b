"""``irpe buckets``: the bucket of each key, seen from one query."""

import argparse
from itertools import groupby

from ...buckets import bucket_functions
from ...errors import IrpeError
from ...geometry import Grid
from ...spec import Spec, parse
from ..pictures import figure, save
from ..plots import bucket_maps, bucket_row, plot_bucket_row, plot_buckets
from ..terminal import number_map, table


def run(given: argparse.Namespace) -> None:
    """Print the map, and draw it if a file is named."""
    spec = parse(given.spec)
    size = bucket_functions(spec)[0].size  # raises for encodings without buckets
    if 2 in spec.axes:
        _image(spec, size, given)
    else:
        _text(spec, size, given)


def _image(spec: Spec, size: int, given: argparse.Namespace) -> None:
    height, width = given.grid
    at = (height // 2, width // 2) if given.at is None else given.at
    if len(at) != 2:
        raise IrpeError(f"--at {at[0]} is no patch of an image: say ROW,COLUMN, as {at[0]},0")
    grid = Grid(height, width)
    maps = bucket_maps(spec, grid, at)
    print(f"{spec}: buckets of the keys around the query at {at[0]},{at[1]}")
    for name, ids in zip(("rows", "columns") if len(maps) == 2 else ("",), maps, strict=True):
        used = ids.unique().numel()
        print(f"{name}{name and ': '}{used} of the table's {size} in use from here")
        print("\n".join(number_map(ids.tolist(), at)))
    if given.out:
        side = min(0.3 * (1.5 if len(maps) == 2 else 1), 12 / max(height, width))
        made = figure(max(3.5, 0.75 + side * width), max(3.0, 0.9 + side * height))
        axes = made.subplots()
        plot_buckets(spec, grid, at, axes)
        axes.set_title(f"{spec}\n{axes.get_title()}, query at {at[0]},{at[1]}", fontsize=10)
        save(made, given.out)


def _text(spec: Spec, size: int, given: argparse.Namespace) -> None:
    at: tuple[int, ...] = (given.length // 2,) if given.at is None else given.at
    if len(at) != 1:
        raise IrpeError(f"--at {at[0]},{at[1]} is no token of a text: say one number, as {at[0]}")
    row = bucket_row(spec, given.length, at[0]).tolist()
    print(f"{spec}: buckets of the keys around the query at {at[0]}")
    print(f"{len(set(row))} of the table's {size} in use from here\n")
    rows: list[tuple[object, ...]] = [("offset of the key, tokens", "bucket")]
    for bucket, run_of in groupby(enumerate(row), key=lambda pair: pair[1]):
        places = [place - at[0] for place, _ in run_of]
        ends = f"{places[0]:+d}" if len(places) == 1 else f"{places[0]:+d} to {places[-1]:+d}"
        rows.append((ends, bucket))
    print("\n".join(table(rows)))
    if given.out:
        made = figure(7.0, 3.5)
        plot_bucket_row(spec, given.length, at[0], made.subplots())
        save(made, given.out)
