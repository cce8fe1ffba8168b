"""Attention as the command shows it, against loops over what the model's layers are given."""

import math
import re

import pytest
import timm
import torch
from hosting import fill, seen_by
from oracles import attention as truth
from oracles import buckets as plain
from PIL import Image

import irpe
from irpe.tools.attention import mean_distances, watch
from irpe.tools.attention_plot import draw_layer
from irpe.tools.command import main

SPEC = "rpe-1.9-product-ctx-1-qkv"
HEIGHT, WIDTH, AT = 3, 4, (2, 1)


def make(name="test_vit", spec=SPEC, **options):
    """A small model with random tables, and with attention that is not nearly uniform."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=(48, 64), **options).eval()
    for key, parameter in model.named_parameters():
        if "qkv.weight" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    if spec is not None:
        irpe.attach(model, spec)
    return fill(model)


def projected(model, number, image):
    """q and k ``[1, H, L, D]`` of a layer, from what enters it."""
    module = model.blocks[number].attn
    entered = seen_by(module, lambda: model(image))[0]
    with torch.no_grad():
        qkv = module.qkv(entered).unflatten(-1, (3, module.num_heads, -1))
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)
        return module, module.q_norm(q), module.k_norm(k)


@pytest.mark.parametrize(
    ("name", "spec"), [("test_vit", SPEC), ("test_vit3", SPEC), ("test_vit", None)]
)
def test_maps_and_distances(name, spec):
    model, image = make(name, spec), torch.randn(1, 3, 48, 64)
    prefix = model.num_prefix_tokens
    grid = irpe.Grid(HEIGHT, WIDTH, prefix=prefix)
    layers = watch(model, image, grid, AT)
    assert len(layers) == len(model.blocks)
    places = [plain.grid(HEIGHT, WIDTH, prefix)]
    query = prefix + AT[0] * WIDTH + AT[1]
    for number, layer in enumerate(layers):
        module, q, k = projected(model, number, image)
        q, k = q.double(), k.double()
        length, scale = q.shape[2], q.shape[3] ** -0.5
        unit = torch.eye(length, dtype=torch.float64).expand(1, q.shape[1], -1, -1)
        tables = []
        if spec is not None:
            (function,) = plain.buckets(irpe.parse(spec))
            tables = [(on, getattr(module, f"rpe_{on}").table.double(), function) for on in "qk"]
        wanted = truth.attention(q, k, unit, tables, places, places)[0].detach()
        for head in range(q.shape[1]):
            far = []
            for i in range(prefix, length):
                seen = [float(wanted[head, i, j]) for j in range(prefix, length)]
                steps = [math.dist(places[0][i], places[0][j]) for j in range(prefix, length)]
                far.append(sum(a * b for a, b in zip(seen, steps, strict=True)) / sum(seen))
            assert float(layer.distances[head]) == pytest.approx(sum(far) / len(far), rel=1e-4)
            outside = sum(float(wanted[head, query, j]) for j in range(prefix))
            assert float(layer.prefix[head]) == pytest.approx(outside, rel=1e-3, abs=1e-7)
            for y in range(HEIGHT):
                for x in range(WIDTH):
                    j = prefix + y * WIDTH + x
                    seen = float(layer.attention[head, y, x])
                    assert seen == pytest.approx(float(wanted[head, query, j]), rel=1e-3, abs=1e-6)
                    if spec is None:
                        continue
                    dy, dx = AT[0] - y, AT[1] - x
                    r_k = module.rpe_k.table[0, :, function(dy, dx)].double().detach()
                    r_q = module.rpe_q.table[0, :, function(-dy, -dx)].double().detach()
                    added = scale * (q[0, head, query] @ r_k + k[0, head, j] @ r_q)
                    found = float(layer.position[head, y, x])
                    assert found == pytest.approx(float(added), rel=1e-3, abs=1e-5)
        assert (layer.position is None) == (spec is None)


def test_distances_of_known_attention():
    """To oneself it is 0 patches, evenly over a row of three 8/9; prefixes are nowhere."""
    grid = irpe.Grid(1, 3, prefix=1)
    own = torch.eye(4) * 0.5
    own[:, 0] += 0.5
    even = torch.full((4, 4), 0.25)
    found = mean_distances(torch.stack((own, even)), grid)
    torch.testing.assert_close(found, torch.tensor([0.0, 8 / 9]))


def test_rotary_attention_has_no_part_of_its_own():
    layers = watch(make(spec="rope-axial"), torch.randn(1, 3, 48, 64), irpe.Grid(3, 4, 1), AT)
    assert all(layer.position is None for layer in layers)
    plain_layers = watch(make(spec=None), torch.randn(1, 3, 48, 64), irpe.Grid(3, 4, 1), AT)
    assert not torch.allclose(layers[0].attention, plain_layers[0].attention, atol=1e-3)


def test_what_is_drawn():
    model, image = make(), torch.randn(1, 3, 48, 64)
    layers = watch(model, image, irpe.Grid(HEIGHT, WIDTH, model.num_prefix_tokens), AT)
    figure = draw_layer(layers, 3, torch.rand(48, 64, 3), AT, "title")
    top, first, second = figure.subfigs
    for part, maps in ((first, layers[2].attention), (second, layers[2].position)):
        drawn = {a.get_title(): a.images[0].get_array() for a in part.axes if a.get_title()}
        assert len(drawn) == len(maps)
        for head, values in enumerate(maps):
            assert (drawn[f"head {head + 1}"] == values.numpy()).all()
        assert "layer 3" in part._suptitle.get_text()
    dots = [line for line in top.axes[1].lines if line.get_marker() == "o"]
    assert [list(line.get_ydata()) for line in dots] == [one.distances.tolist() for one in layers]


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a.png"
    Image.effect_noise((80, 64), 90).convert("RGB").save(path)
    return path


def test_the_command(picture, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = make()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    given = ["attention", "test_vit", picture.name, "--rpe", SPEC, "--size", "48x64"]
    given += ["--at", "2,1", "--layer", "2"]
    drawn = tmp_path / "b.png"
    assert main([*given, "--checkpoint", "a.pth", "--out", "b.png"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert max(map(len, out)) <= 80 and drawn.stat().st_size > 10_000
    assert "trained weights" in out[0] and "3x4 patches, the query at 2,1" in out[1]
    assert len([line for line in out if re.fullmatch(r" +\d+( +\d+\.\d\d){3}", line)]) == 6
    heads = [line.split() for line in out if re.search(r"\d,\d .*\d\.\d{4}", line)]
    assert [line[0] for line in heads] == [
        str(n + 1) for n in range(model.blocks[0].attn.num_heads)
    ]
    assert main(given) == 0
    assert "RANDOM weights" in capsys.readouterr().out


WRONG = {
    "no such model": (["attention", "test_vjt", "a.png"], "'test_vjt'.*test_vit"),
    "no such picture": (["attention", "test_vit", "none.png"], "image 'none.png' is not a file"),
    "not a picture": (["attention", "test_vit", "text.png"], "'text.png' is not a picture"),
    "off the grid": (["attention", "test_vit", "a.png", "--at", "10,0"], "10, 0.*10x10"),
    "no such layer": (["attention", "test_vit", "a.png", "--layer", 7], "--layer 7.*6 layers"),
    "no grid": (["attention", "resnet10t", "a.png"], "resnet10t has no fixed grid"),
    "windows": (["attention", "swin_tiny_patch4_window7_224", "a.png"], "not over all"),
    "another model's weights": (
        ["attention", "test_vit", "a.png", "--checkpoint", "other.pth"],
        "'other.pth' does not fit this model.*missing.*cls_token.*--rpe",
    ),
    "one number": (["attention", "test_vit", "a.png", "--at", "3"], "--at 3.*3,0"),
}


@pytest.mark.parametrize(("argv", "part"), WRONG.values(), ids=WRONG.keys())
def test_a_mistake_is_one_line(argv, part, picture, monkeypatch, capsys):
    monkeypatch.chdir(picture.parent)
    (picture.parent / "text.png").write_text("just text\n")
    torch.save({"a": torch.ones(1)}, picture.parent / "other.pth")
    assert main(list(map(str, argv))) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and re.match(f"error: .*{part}", err[0]), err
