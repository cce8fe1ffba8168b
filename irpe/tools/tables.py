"""Learned tables of image encodings as maps over offsets, by layer and head.

Offsets here are (row, column) of the key minus those of the query, so that maps have the
orientation of the image.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..encodings.rpe import RPE, parse_image
from ..errors import IrpeError
from ..spec import Spec
from .pictures import COLOURS, colour_bar, figure

_KEY = re.compile(
    r"(?P<owner>.*?)\.?(?P<kind>rpe_[qkv])(?:\.(?P<part>rp_rows|rp_cols))?"
    r"\.lookup_table_(?P<mode>weight|bias)"
)
PLACES = {
    "rpe_q": "on the queries (dot product with the key)",
    "rpe_k": "on the keys (dot product with the query)",
    "rpe_v": "on the values (added to the value)",
}


@dataclass(frozen=True, slots=True)
class Tables:
    """The tables of one kind, over the same offsets.

    Args:
        kind: ``rpe_q``, ``rpe_k`` or ``rpe_v``.
        layers: numbers of the layers, from 1.
        values: for each layer ``[H | 1, 2 height - 1, 2 width - 1]``: the Euclidean norm of the
            bucket's vector, or the bias. For method cross, vectors or biases of rows and columns
            are added first.
        what: description of the values.
    """

    kind: str
    layers: list[int]
    values: list[Tensor]
    what: str


def trained_grid(weights: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Return (side, side) of a square absolute embedding with up to two prefix rows, or None."""
    rows = (v for k, v in weights.items() if k.endswith("pos_embed") and v.dim() == 3)
    length = next((v.shape[1] for v in rows), 0)  # [1, L, C]
    for prefix in (1, 0, 2):
        side = math.isqrt(max(length - prefix, 0))
        if side and side * side == length - prefix:
            return side, side
    return None


def read_tables(
    weights: Mapping[str, Tensor], spec: str | Spec, grid: tuple[int, int]
) -> list[Tables]:
    """Return all tables of a state dict, over the offsets of a grid (height, width).

    Raises:
        IrpeError: if there are no tables, or they do not fit the spec.
    """
    spec = parse_image(spec)
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    modes = set()
    for key, table in weights.items():
        match = _KEY.fullmatch(key)
        if match:
            modes.add(match["mode"])
            parts = found.setdefault(match["kind"], {}).setdefault(match["owner"], {})
            parts[match["part"] or "whole"] = table.detach().float().cpu()
    if not found:
        raise IrpeError("no tables: no key ends in lookup_table_weight or lookup_table_bias")
    wanted = "bias" if spec.mode == "bias" else "weight"
    if modes != {wanted}:
        raise IrpeError(
            f"{spec} has lookup_table_{wanted}, not lookup_table_{min(modes - {wanted})}"
        )
    what = "bias on the logit" if spec.mode == "bias" else "norm of the bucket's vector"
    kinds = []
    for kind in sorted(found, key="rpe_q rpe_k rpe_v".index):
        owners = sorted(found[kind], key=_numbers)
        values = [over_offsets(spec, kind, found[kind][owner], grid) for owner in owners]
        kinds.append(Tables(kind, _layers(owners), values, what))
    return kinds


def over_offsets(
    spec: RPE, kind: str, parts: Mapping[str, Tensor], grid: tuple[int, int]
) -> Tensor:
    """Return the values ``[H | 1, 2 height - 1, 2 width - 1]`` of one layer, see ``Tables``.

    Args:
        spec: the encoding.
        kind: ``rpe_q``, ``rpe_k`` or ``rpe_v``.
        parts: the table as ``whole``; for method cross ``rp_rows`` and ``rp_cols``.
        grid: (height, width) in patches.

    Raises:
        IrpeError: if the parts or shapes do not fit the spec.
    """
    names = ("rp_rows", "rp_cols") if spec.method == "cross" else ("whole",)
    if set(parts) != set(names):
        raise IrpeError(f"{spec} has {' and '.join(names)} in {kind}, not {' and '.join(parts)}")
    rows, columns = (torch.arange(1 - n, n) for n in grid)
    offsets = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)
    # Tables on keys and values have the buckets of query - key, tables on queries of key - query.
    offsets = offsets if kind == "rpe_q" else -offsets
    total: Any = 0
    for name, function in zip(names, spec.buckets(), strict=True):
        table = parts[name]
        if kind == "rpe_v":
            table = table.transpose(-2, -1)  # [H, N, D] -> [H, D, N]
        if table.dim() != (2 if spec.mode == "bias" else 3) or (
            table.shape[-1] - function.size not in (0, 1)
        ):
            raise IrpeError(
                f"{kind} has a table {list(parts[name].shape)}, but {spec} makes {function.size} "
                "buckets, and one more for class tokens"
            )
        total = total + table[..., function(offsets)]
    return total if spec.mode == "bias" else total.norm(dim=1)


def draw_tables(tables: list[Tables], title: str) -> Any:
    """Return a figure with a map for each layer and head, and a scale for each kind; 0 is grey."""
    shapes = [_shape(t) for t in tables]
    height, width = tables[0].values[0].shape[1:]
    side = 1.15 if max(columns for _, columns in shapes) > 4 else 1.6
    tall = [rows * (side * height / width + 0.3) + 0.9 for rows, _ in shapes]
    across = max(5.5, max(columns for _, columns in shapes) * (side + 0.15) + 1.6)
    made = figure(across, sum(tall) + 0.4)
    made.suptitle(title, fontsize=11)
    bands = made.subfigures(len(tables), 1, height_ratios=tall, squeeze=False)[:, 0]
    for band, kind, shape in zip(bands, tables, shapes, strict=True):
        _draw(band, kind, shape)
    return made


def _draw(band: Any, kind: Tables, shape: tuple[int, int]) -> None:
    band.suptitle(f"{kind.kind}, {PLACES[kind.kind]}", fontsize=10)
    grid = band.subplots(*shape, squeeze=False, sharex=True, sharey=True)
    maps = [
        (f"layer {n}" + (f", head {h + 1}" if len(value) > 1 else ""), value[h])
        for n, value in zip(kind.layers, kind.values, strict=True)
        for h in range(len(value))
    ]
    least = min(float(value.min()) for value in kind.values)
    most = max(float(value.max()) for value in kind.values)
    for axes in grid.flat[len(maps) :]:
        axes.set_axis_off()
    for axes, (name, value) in zip(grid.flat, maps, strict=False):
        rows, columns = (n // 2 for n in value.shape)
        axes.set_facecolor("0.85")
        image = axes.imshow(
            value.masked_fill(value == 0, math.nan).numpy(),
            cmap=COLOURS,
            vmin=least,
            vmax=most if most > least else least + 1.0,
            extent=(-columns - 0.5, columns + 0.5, rows + 0.5, -rows - 0.5),
        )
        axes.set_title(name, fontsize=8)
        axes.set_xticks(sorted({-columns, 0, columns}))
        axes.set_yticks(sorted({-rows, 0, rows}))
        axes.tick_params(labelsize=7, length=2)
    band.supxlabel("column of the key - column of the query, patches", fontsize=9)
    band.supylabel("row of the key - row of the query, patches", fontsize=9)
    colour_bar(band, image, grid, kind.what)


def _shape(kind: Tables) -> tuple[int, int]:
    """Return rows and columns of maps: a row for each layer; shared tables in rows of up to six."""
    heads = max(len(value) for value in kind.values)
    if heads > 1:
        return len(kind.layers), heads
    lines = math.ceil(len(kind.layers) / 6)
    return lines, math.ceil(len(kind.layers) / lines)


def _numbers(owner: str) -> list[int]:
    return [int(part) for part in owner.split(".") if part.isdecimal()]


def _layers(owners: list[str]) -> list[int]:
    """Return the numbers of layers, from 1; blocks.7.attn is layer 8."""
    found = [_numbers(owner)[-1:] for owner in owners]
    last = [number + 1 for numbers in found for number in numbers]
    unique = len(set(last)) == len(owners)
    return last if unique else list(range(1, len(owners) + 1))
