"""``irpe buckets``: the bucket of each key for one query."""

import argparse
from itertools import groupby

from ...buckets.image import AXES
from ...encodings import bucket_ids, parse
from ...errors import IrpeError
from ...geometry import Grid, Sequence, Volume
from ...spec import Spec
from ..pictures import figure, save
from ..plots import bucket_maps, bucket_row, plot_bucket_row, plot_buckets
from ..terminal import number_map, table


def run(given: argparse.Namespace) -> None:
    """Print the map; with --out, draw it."""
    spec = parse(given.spec)
    image = 2 in spec.axes
    unused, instead = ("length", "grid") if image else ("grid", "length")
    if getattr(given, unused) is not None:
        what = "images" if image else "texts"
        raise IrpeError(f"{spec} is for {what}: give --{instead}, not --{unused}")
    given.grid, given.length = given.grid or (14, 14), given.length or 64
    kind = Volume if len(given.grid) == 3 else Grid
    # Raise early for encodings without buckets.
    _, size = bucket_ids(spec, kind(*[1] * len(given.grid)) if image else Sequence(1))
    if image:
        _image(spec, size, given)
    else:
        _text(spec, size, given)


def _image(spec: Spec, size: int, given: argparse.Namespace) -> None:
    video = len(given.grid) == 3
    at = tuple(side // 2 for side in given.grid) if given.at is None else given.at
    if len(at) != len(given.grid):
        form = "video: give FRAME,ROW,COLUMN" if video else "image: give ROW,COLUMN"
        example = ",".join([str(at[0]), *["0"] * (len(given.grid) - 1)])
        said = ",".join(map(str, at))
        raise IrpeError(f"--at {said} is not a patch of the {form}, as {example}")
    if given.frame is not None and not video:
        raise IrpeError("--frame is for three axes, as --grid 8x14x14")
    grid = Volume(*given.grid) if video else Grid(*given.grid)
    maps = bucket_maps(spec, grid, at, given.frame)
    where = ",".join(map(str, at))
    if video:
        where += f", of frame {at[0] if given.frame is None else given.frame}"
    print(f"{spec}: buckets of the keys around the query at {where}")
    names = ("",) if len(maps) == 1 else AXES[-len(maps) :]
    for name, ids in zip(names, maps, strict=True):
        used = ids.unique().numel()
        print(f"{name}{name and ': '}{used} of the table's {size} in use for this query")
        print("\n".join(number_map(ids.tolist(), (at[-2], at[-1]))))
    if given.out:
        side = min(0.3 * (0.5 + 0.5 * len(maps)), 12 / max(grid.height, grid.width))
        made = figure(max(3.5, 0.75 + side * grid.width), max(3.0, 0.9 + side * grid.height))
        axes = made.subplots()
        plot_buckets(spec, grid, at, axes, given.frame)
        axes.set_title(f"{spec}\n{axes.get_title()}, query at {where}", fontsize=10)
        save(made, given.out)


def _text(spec: Spec, size: int, given: argparse.Namespace) -> None:
    at: tuple[int, ...] = (given.length // 2,) if given.at is None else given.at
    if len(at) != 1:
        said = ",".join(map(str, at))
        raise IrpeError(f"--at {said} is not a token of a text: give one number, as {at[0]}")
    row = bucket_row(spec, given.length, at[0]).tolist()
    print(f"{spec}: buckets of the keys around the query at {at[0]}")
    print(f"{len(set(row))} of the table's {size} in use for this query\n")
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
