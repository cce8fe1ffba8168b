"""What is drawn of learned tables is what they hold: read back from the axes, against loops."""

import math
import re

import pytest
import torch
from oracles import buckets as plain

import irpe
from irpe.tools.command import main
from irpe.tools.tables import draw_tables, read_tables, trained_grid

HEADS, DIM = 3, 4


def state(spec, layers=(0, 2, 10), prefix=1):
    """Random tables under the names of models, as files hold them: in no order."""
    torch.manual_seed(1)
    made = irpe.build_rpe(spec, head_dim=DIM, num_heads=HEADS, prefix=int(prefix))
    return {
        f"blocks.{layer}.attn.rpe_{on}.{name}": torch.randn_like(parameter)
        for layer in sorted(layers, key=str)
        for on, module in zip("qkv", made, strict=True)
        if module is not None
        for name, parameter in module.named_parameters()
    }


def by_loops(spec, weights, kind, layer, head, dy, dx):
    """The value of one offset of the key from the query."""
    spec = irpe.parse(spec)
    sign = 1 if kind == "rpe_q" else -1  # buckets are of query - key, on the queries of key - query
    names = [".rp_rows", ".rp_cols"] if spec.method == "cross" else [""]
    total = [0.0] * (1 if spec.mode == "bias" else DIM)
    for name, function in zip(names, plain.buckets(spec), strict=True):
        bucket = function(sign * dy, sign * dx)
        ending = "bias" if spec.mode == "bias" else "weight"
        table = weights[f"blocks.{layer}.attn.{kind}{name}.lookup_table_{ending}"]
        table = table[head if len(table) > 1 else 0]
        for channel in range(len(total)):
            if spec.mode == "bias":
                total[channel] += table[bucket].item()
            else:
                entry = table[bucket, channel] if kind == "rpe_v" else table[channel, bucket]
                total[channel] += entry.item()
    return total[0] if spec.mode == "bias" else math.sqrt(sum(c * c for c in total))


SPECS = [
    ("rpe-1.9-product-ctx-0-qkv", True),
    ("rpe-2.0-product-bias-0-qk", True),
    ("rpe-2.0-cross-ctx-1-qv", False),
    ("rpe-2.0-cross-bias-1-k", True),
    ("rpe-5.0-euc-ctx-1-k", False),
]


@pytest.mark.parametrize(("spec", "prefix"), SPECS, ids=[s for s, _ in SPECS])
def test_drawn_tables(spec, prefix):
    weights = state(spec, prefix=prefix)
    height, width = 4, 6
    figure = draw_tables(read_tables(weights, spec, (height, width)), "title")
    seen = []
    for band in figure.subfigs:
        kind = re.match(r"rpe_.", band._suptitle.get_text())[0]
        maps = [axes for axes in band.axes if axes.images and axes.get_title()]
        for axes in maps:
            (image,) = axes.images
            layer, head = re.fullmatch(r"layer (\d+)(?:, head (\d+))?", axes.get_title()).groups()
            left, right, bottom, top = image.get_extent()
            drawn = image.get_array()
            assert drawn.shape == (2 * height - 1, 2 * width - 1)
            for row in range(drawn.shape[0]):
                for column in range(drawn.shape[1]):
                    # Where this cell is drawn, by the axes' own scale.
                    dy = round(top + (row + 0.5) * (bottom - top) / drawn.shape[0])
                    dx = round(left + (column + 0.5) * (right - left) / drawn.shape[1])
                    place = (int(layer) - 1, int(head or 1) - 1)
                    wanted = by_loops(spec, weights, kind, *place, dy, dx)
                    assert drawn[row, column] == pytest.approx(wanted, rel=1e-5, abs=1e-6)
            seen.append((kind, int(layer), int(head or 1)))
        limits = {axes.images[0].get_clim() for axes in maps}
        assert len(limits) == 1, "one scale for all"
        least, most = limits.pop()
        assert all(least <= a.images[0].get_array().min() for a in maps)
        assert all(a.images[0].get_array().max() <= most for a in maps)
    parsed = irpe.parse(spec)
    heads = 1 if parsed.shared else HEADS
    wanted = [(f"rpe_{on}", n, h + 1) for on in parsed.on for n in (1, 3, 11) for h in range(heads)]
    assert seen == wanted


def test_the_command(tmp_path, capsys):
    spec = "rpe-1.9-product-ctx-1-k"
    weights = state(spec)
    torch.save({"model": weights, "args": {"enc_rpe2d": spec}}, tmp_path / "a.pth")
    picture = tmp_path / "a.png"
    argv = ["tables", str(tmp_path / "a.pth"), "--grid", "4x6", "--out", str(picture)]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert picture.stat().st_size > 10_000
    lines = [line.split() for line in out.splitlines() if re.match(r" +\d", line)]
    assert [line[0] for line in lines] == ["1", "3", "11"]
    for layer, head, centre, mean, least, most, place, *unused in lines:
        assert unused == ["0", "of", "77"]
        offsets = [(y, x) for y in range(-3, 4) for x in range(-5, 6)]
        values = {o: by_loops(spec, weights, "rpe_k", int(layer) - 1, 0, *o) for o in offsets}
        wanted = (values[0, 0], sum(values.values()) / len(values), min(values.values()))
        assert (centre, mean, least) == tuple(f"{n:.4f}" for n in wanted)
        assert head == "all" and most == f"{max(values.values()):.4f}"
        top = tuple(map(int, place.split(",")))
        assert values[top] == pytest.approx(max(values.values()))


def test_buckets_that_were_never_used(tmp_path, capsys):
    """Tables begin at zero: a layer that nothing reads, and one bucket of another."""
    spec = "rpe-1.9-product-ctx-1-k"
    weights = state(spec)
    names = sorted(weights)
    weights[names[0]] = torch.zeros_like(weights[names[0]])
    weights[names[1]][..., 24] = 0  # of the same place
    torch.save({"model": weights, "args": {"enc_rpe2d": spec}}, tmp_path / "a.pth")
    argv = ["tables", str(tmp_path / "a.pth"), "--grid", "3x3", "--out", str(tmp_path / "a.png")]
    assert main(argv) == 0
    lines = [
        line.split() for line in capsys.readouterr().out.splitlines() if re.match(r" +\d", line)
    ]
    found = sorted(line[-3:] for line in lines)
    assert found == [["0", "of", "25"], ["1", "of", "25"], ["25", "of", "25"]]


def test_names_of_detr_and_of_equal_numbers():
    spec = "rpe-1.9-product-ctx-1-k"
    table = torch.randn(1, DIM, 49)
    name = "transformer.encoder.layers.{}.self_attn.rpe_k.lookup_table_weight"
    found = read_tables({name.format(n): table for n in (10, 0, 9)}, spec, (3, 3))
    assert found[0].layers == [1, 10, 11]
    name = "layers.{}.blocks.0.attn.rpe_k.lookup_table_weight"  # as Swin's
    found = read_tables({name.format(n): table for n in (0, 1)}, spec, (3, 3))
    assert found[0].layers == [1, 2]


def test_the_grid_that_a_checkpoint_was_trained_on():
    for length, grid in ((16, (4, 4)), (17, (4, 4)), (198, (14, 14)), (15, None), (2, (1, 1))):
        assert trained_grid({"net.pos_embed": torch.zeros(1, length, 8)}) == grid, length
    assert trained_grid({"weight": torch.zeros(4, 4)}) is None
    for shape in ((16,), (1, 8, 5, 16)):  # a map's, or nobody's
        assert trained_grid({"pos_embed": torch.zeros(shape)}) is None, shape
