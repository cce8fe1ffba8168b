"""First use without documentation: help, and one line for each mistake."""

import argparse
import re
import shlex
import subprocess
import sys

import pytest
import timm
import torch

import irpe
from irpe.encodings import SPECS as NAMES
from irpe.encodings import parse
from irpe.encodings.rpe import METHODS, MODES
from irpe.tools.arguments import parser
from irpe.tools.command import main
from irpe.tools.complexity import activations, multiply_adds, parameters

(CHOICES,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
COMMANDS = CHOICES.choices


def run(capsys, *argv):
    """Exit status, lines of output, lines of errors."""
    try:
        status = main([str(word) for word in argv])
    except SystemExit as stopped:
        status = stopped.code
    out, err = capsys.readouterr()
    return status, out.splitlines(), err.splitlines()


def test_without_arguments_it_says_what_there_is(capsys):
    status, out, err = run(capsys)
    assert status == 0 and not err and len(out) < 25
    for name in COMMANDS:
        assert any(line.split()[:1] == [name] for line in out), name


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_that_can_be_parsed(name, capsys):
    status, out, _ = run(capsys, name, "--help")
    assert status == 0 and max(map(len, out)) <= 80
    example = out[out.index("example:") + 1].strip()
    words = shlex.split(example)
    assert words[:2] == ["irpe", name]
    assert parser().parse_args(words[1:]).command == name


def test_python_m_irpe():
    run = [sys.executable, "-m", "irpe", "spces"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(r"error: .*'spces'.*specs.*\n", done.stderr)


WRONG = {
    "no such command": (["bucket", "rope"], "'bucket'"),
    "nothing to draw": (["buckets"], "required: spec"),
    "unknown option": (["buckets", "rope", "--hights", 3], "--hights"),
    "a spec that does not parse": (["buckets", "rpe-1.9-prodct-ctx-1-k"], "method='prodct'.*prod"),
    "an unknown encoding": (["buckets", "rop"], "unknown encoding 'rop'.*rope"),
    "no buckets": (["buckets", "rope"], "rope has no buckets over"),
    "not a grid": (["buckets", "rpe-1.9-product-ctx-1-k", "--grid", "14"], "'14'.*HEIGHTxWIDTH"),
    "no patches": (["buckets", "rpe-1.9-product-ctx-1-k", "--grid", "0x3"], "'0x3'"),
    "off the grid": (["buckets", "rpe-1.9-product-ctx-1-k", "--at", "3,14"], "3, 14.*14x14"),
    "not a place": (["buckets", "rpe-1.9-product-ctx-1-k", "--at", "a,b"], "'a,b'.*ROW,COL"),
    "one number": (["buckets", "rpe-1.9-product-ctx-1-k", "--at", "7"], "--at 7.*7,0"),
    "two axes of a video": (
        ["buckets", "rpe-1.9-euc-ctx-1-k", "--grid", "2x3x4", "--at", "1,1"],
        "--at 1,1.*FRAME,ROW,COLUMN",
    ),
    "no such frame": (
        ["buckets", "rpe-1.9-euc-ctx-1-k", "--grid", "2x3x4", "--frame", 2],
        "no frame 2 among 2",
    ),
    "a frame of an image": (["buckets", "rpe-1.9-euc-ctx-1-k", "--frame", 1], "three axes"),
    "two numbers": (["buckets", "t5", "--at", "7,7"], "--at 7,7.*one number"),
    "off the text": (["buckets", "t5", "--at", 70], "no token 70.*64 tokens"),
    "no length": (["buckets", "t5", "--length", 0], "'0'"),
    "a grid of a text": (["buckets", "t5", "--grid", "4x4"], "texts: give --length, not --grid"),
    "a length of an image": (
        ["buckets", "rpe-1.9-euc-ctx-1-k", "--length", 9],
        "images: give --grid, not --length",
    ),
    "no buckets on a grid": (["buckets", "rope-axial", "--grid", "4x4"], "no buckets over a Grid "),
    "not a picture's name": (["buckets", "t5", "--out", "a.xyz"], r"'a.xyz'.*\.png"),
    "no such folder": (["buckets", "t5", "--out", "none/a.png"], "none/a.png"),
    "no shape": (["explain", "--shape", "1,2,3"], "'1,2,3'.*B,H,L,D"),
    "not a square": (["explain", "rpe-1.9-product-ctx-1-k", "--prefix", 2], "195 patches.*--grid"),
    "another grid": (
        ["explain", "rpe-1.9-product-ctx-1-k", "--grid", "7x7"],
        "50 queries and 50 keys.*L=197",
    ),
    "no patch left": (["explain", "rope", "--prefix", 197], "197 tokens and --prefix 197"),
    "not a dtype": (["explain", "--dtype", "int8"], "'int8'.*bfloat16"),
    "an unknown model": (["cost", "diet_small_patch16_224", "--rpe", "rope"], "deit_small_patch"),
    "an unknown model alone": (["cost", "diet_small_patch16_224"], "deit_small_patch"),
    "nothing like it": (["cost", "qqqqqqqqqqqq", "--rpe", "rope"], "timm.list_models"),
    "no encoding": (["cost", "test_vit"], "test_vit has no encoding.*--rpe"),
    "for texts": (["cost", "test_vit", "--rpe", "rope"], "rope is for positions on one axis"),
    "no attention": (["cost", "resnet18", "--rpe", "rope-axial"], "ResNet has no attention"),
    "a size that does not fit": (["cost", "test_vit", "--size", 161, "--rpe", "alibi"], "161"),
    "not a size": (["cost", "test_vit", "--size", "big"], "'big"),
    "tables of nothing": (["tables", "none.pth"], "'none.pth' is not a file"),
    "an unknown encoding of tables": (["tables", "tables.pth"], "does not contain its spec.*--rpe"),
    "no tables": (["tables", "plain.pth", "--rpe", "rpe-1.9-product-ctx-1-k"], "no tables"),
    "other tables": (["tables", "tables.pth", "--rpe", "rpe-2.0-product-ctx-1-k"], "50.*81"),
    "tables of a bias": (["tables", "tables.pth", "--rpe", "rpe-1.9-product-bias-1-k"], "_bias"),
    "tables of another method": (["tables", "tables.pth", "--rpe", "rpe-1.9-cross-ctx-1-k"], "rp_"),
    "tables of texts": (["tables", "tables.pth", "--rpe", "t5"], "t5.* is not of the form"),
    "missing checkpoint": (["convert", "none.pth", "b.safetensors"], "'none.pth' is not a file"),
    "nothing to convert": (["convert", "a.pth", "b.pt"], r"'a.pth' to 'b.pt'.*\.safetensors"),
    "not a checkpoint": (["convert", "text.pth", "b.safetensors"], "'text.pth' is trunc"),
    "not safetensors": (["convert", "text.safetensors", "b.pth"], "'text.safetensors' is trunc"),
    "no weights": (["convert", "list.pth", "b.safetensors"], "has no weights"),
    "a file in the way": (["convert", "list.pth", "text.safetensors"], "exists already"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with files that are not what their names say."""
    monkeypatch.chdir(tmp_path)
    for name in ("text.pth", "text.safetensors", "text.png"):
        (tmp_path / name).write_text("just text\n")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"a": torch.ones(2)}, tmp_path / "plain.pth")
    table = {"blocks.0.attn.rpe_k.lookup_table_weight": torch.ones(1, 4, 50)}
    torch.save(table, tmp_path / "tables.pth")
    return tmp_path


@pytest.mark.parametrize(("argv", "part"), WRONG.values(), ids=WRONG.keys())
def test_a_mistake_is_one_line(argv, part, folder, capsys):
    before = sorted(folder.iterdir())
    status, _, err = run(capsys, *argv)
    assert status == 2 and len(err) == 1, err
    assert re.match(f"error: .*{part}", err[0]), err[0]
    assert sorted(folder.iterdir()) == before


MISSING = {
    "matplotlib": (["buckets", "t5", "--out", "a.png"], '"irpe[plot]"'),
    "safetensors": (["convert", "plain.pth", "b.safetensors"], "safetensors"),
    "timm": (["cost", "deit_tiny_patch16_224", "--rpe", "alibi"], '"irpe[timm]"'),
    "fvcore": (["cost", "deit_tiny_patch16_224", "--rpe", "alibi"], '"irpe[tools]"'),
}


@pytest.mark.parametrize("package", MISSING)
def test_a_missing_extra_is_named(package, folder, capsys, monkeypatch):
    argv, extra = MISSING[package]
    for name in list(sys.modules):
        if name.split(".")[0] == package or name.startswith("irpe.tools."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    status, _, err = run(capsys, *argv)
    assert status == 2 and len(err) == 1
    assert package in err[0] and f"pip install {extra}" in err[0]


def test_other_import_errors_are_bugs(monkeypatch):
    monkeypatch.setitem(sys.modules, "irpe.tools.commands.specs", None)
    with pytest.raises(ImportError):
        main(["specs"])


def test_specs_lists_every_encoding(capsys):
    status, out, _ = run(capsys, "specs")
    assert status == 0 and max(map(len, out)) <= 80
    specs = [parse(text) for kind in {*NAMES.values()} for text, *_ in kind.examples]
    assert {type(spec) for spec in specs} == {*NAMES.values()}
    assert {spec.method for spec in specs if str(spec).startswith("rpe-")} == set(METHODS)
    assert {spec.mode for spec in specs if str(spec).startswith("rpe-")} == set(MODES)
    for name in NAMES:
        assert any(re.match(rf"{name}\b", line) for line in out), name


def test_convert(folder, capsys):
    state = {"blocks.0.attn.rpe_k.lookup_table_weight": torch.randn(1, 4, 50), "n": torch.ones(3)}
    args = argparse.Namespace(enc_rpe2d="rpe-1.9-product-ctx-1-k", lr=0.1)
    torch.save({"model": state, "args": args}, "a.pth")
    status, out, _ = run(capsys, "convert", "a.pth", "b.safetensors")
    assert status == 0
    assert out == ["b.safetensors: 2 tensors, 203 numbers, encoding rpe-1.9-product-ctx-1-k"]
    assert run(capsys, "convert", "b.safetensors", "c.pth")[0] == 0
    again = torch.load("c.pth", weights_only=True)
    assert again["args"] == {"enc_rpe2d": "rpe-1.9-product-ctx-1-k", "lr": "0.1"}
    assert again["model"].keys() == state.keys()
    assert all(torch.equal(again["model"][key], state[key]) for key in state)


def test_cost(capsys):
    """The numbers are those of the counting functions; the increment is their difference."""
    given = {"img_size": (64, 96)}
    spec, image = "rpe-1.9-product-ctx-1-qk", torch.zeros(1, 3, 64, 96)
    plain, attached = (timm.create_model("test_vit", **given) for _ in range(2))
    irpe.attach(attached, spec)
    status, out, err = run(capsys, "cost", "test_vit", "--rpe", spec, "--size", "64x96")
    assert status == 0 and not err and max(map(len, out)) < 80
    rows = {line[:28].strip(): line[28:].replace(",", "").split() for line in out}
    for name, count, unit, places in (
        ("parameters", lambda model: parameters(model), 1, 0),
        ("multiply-adds, M", lambda model: multiply_adds(model, image), 1e6, 1),
        ("weights, MiB of float32", lambda model: parameters(model), 2**18, 2),
        ("activations, MiB of float32", lambda model: activations(model, image), 2**18, 2),
    ):
        a, b = (count(model) / unit for model in (plain, attached))
        assert [f"{n:.{places}f}" for n in (a, b, b - a)] == rows[name][:3]
        assert rows[name][3] == f"{100 * (b - a) / a:.2f}"


def test_cost_of_a_published_name(capsys):
    status, out, _ = run(capsys, "cost", "deit_tiny_patch16_224_ctx_product_50_shared_k")
    assert status == 0
    assert any(line.split()[1:4] == ["5,717,416", "5,755,816", "38,400"] for line in out)
    status, _, err = run(
        capsys, "cost", "deit_tiny_patch16_224_ctx_product_50_shared_k", "--rpe", "alibi"
    )
    assert status == 2 and "has rpe-1.9-product-ctx-1-k already" in err[0]


def test_explain_says_what_explain_says(capsys):
    spec = "rpe-1.9-product-ctx-1-qkv"
    status, out, _ = run(capsys, "explain", spec, "--shape", "2,4,50,8", "--grid", "7x7")
    assert status == 0
    modules = irpe.build_rpe(spec, head_dim=8, num_heads=4, prefix=1)
    q = torch.zeros(2, 4, 50, 8)
    terms = sum((m.terms(irpe.Grid(7, 7, prefix=1)) for m in modules), ())
    wanted = irpe.explain(q, q, q, terms)
    assert " ".join(" ".join(out).split()) == " ".join(wanted.split())


@pytest.mark.parametrize(
    ("argv", "backend"),
    [
        ([], "sdpa"),
        (["rpe-1.9-product-ctx-1-k", "--device", "cuda", "--dtype", "float16"], "triton"),
        (["rpe-1.9-product-ctx-1-k", "--device", "cuda"], "sdpa"),
        (["rpe-1.9-product-ctx-1-v", "--device", "cuda", "--dtype", "float64"], "eager"),
        (["rpe-1.9-product-ctx-1-k"], "eager"),
        (["rpe-1.9-product-ctx-1-k", "--compile"], "reference"),
        (["alibi", "--causal", "--prefix", "0", "--dtype", "bfloat16"], "sdpa"),
        (["alibi"], "eager"),
        (["huang3", "--shape", "1,2,31,4"], "eager"),
    ],
    ids=" ".join,
)
def test_explain_of_any_device(argv, backend, capsys):
    status, out, _ = run(capsys, "explain", *argv)
    assert status == 0 and out[0].startswith(f"backend {backend}: ")
    assert max(map(len, out)) <= 80
    assumed = "cuda" in argv and not torch.cuda.is_available()
    assert any("no such device here" in line for line in out) == assumed
