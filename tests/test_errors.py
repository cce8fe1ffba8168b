"""Wrong input gets one irpe.IrpeError that names the wrong value, never a guess."""

import types

import pytest
import torch
from common import refuses
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import irpe
from models.deit import DeiT

K = "rpe-1.9-product-ctx-1-k"
GRID = irpe.Grid(3, 4, prefix=1)


SPECS = {
    "rpe-2.0-prodct-ctx-1-k": ("prodct", "product"),
    "rpe-0-product-ctx-1-k": ("'0'", "positive"),
    "rpe-0.0-product-ctx-1-k": ("'0.0'", "positive"),
    "rpe--1-product-ctx-1-k": ("rpe--1-product",),
    "rpe-nan-product-ctx-1-k": ("'nan'", "positive"),
    "rpe-inf-product-ctx-1-k": ("'inf'", "positive"),
    "rpe-two-product-ctx-1-k": ("'two'", "number"),
    "rpe-2.0-product-ctx-7-k": ("'7'", "0 or 1"),
    "rpe-2.0-product-ctx-True-k": ("'True'", "0 or 1"),
    "rpe-2.0-product-ctx-1-K": ("'K'", "qkv"),
    "rpe-2.0-product-ctx-1-": ("''", "qkv"),
    "rpe-2.0-product-ctx-1-kq": ("'kq'", "qk"),
    "rpe-2.0-product-ctx-1-kk": ("'kk'", "qk"),
    "rpe-2.0-product-bias-1-v": ("'v'", "ctx"),
    "rpe-2.0-product-bias-1-qkv": ("'qkv'", "ctx"),
    "rpe-2.0-product-context-1-k": ("context", "bias"),
    "rpe-2.0-product-ctx-1": ("rpe-2.0-product-ctx-1", "{ratio}"),
    "rpe-2.0-product-ctx-1-k-k": ("rpe-2.0-product-ctx-1-k-k", "{ratio}"),
    "RPE-2.0-product-ctx-1-k": ("RPE-2.0", "{ratio}"),
    "": ("''", "{ratio}"),
    "alibo": ("alibo", "{ratio}", "alibi"),
    "rpe-2.0-product-ctx-1-k,beta": ("beta", "index="),
    "rpe-2.0-product-ctx-1-k,beta=": ("beta", "number"),
    "rpe-2.0-product-ctx-1-k,beta=-3": ("-3", "positive"),
    "rpe-2.0-product-ctx-1-k,beta=0.5": ("0.5", "single bucket"),
    "rpe-0.2-product-ctx-1-k": ("0.4", "single bucket"),
    "rpe-2.0-product-ctx-1-k,delta=3": ("delta=3", "gamma="),
    "rpe-2.0-product-ctx-1-k,beta=3,beta=3": ("beta", "twice"),
    "rpe-2.0-product-ctx-1-k,ratio=3": ("ratio=3", "gamma="),
    "rpe-2.0-product-ctx-1-k,index=log": ("log", "clip"),
    "rpe-2.0-product-ctx-1-k,": ("''", "options"),
    "rpe-2.0-product-ctx-1-k,alpha=9": ("9", "beta"),
    "rpe-2.0-product-ctx-1-k,gamma=1": ("1", "gamma"),
    "rpe- 2-product-ctx-1-k": ("' 2'", "number"),
    "rpe-2_0-product-ctx-1-k": ("'2_0'", "number"),
    "rpe-\u0662-product-ctx-1-k": ("\u0662", "number"),
}


@pytest.mark.parametrize("spec", SPECS)
def test_spec_strings(spec):
    refuses(lambda: irpe.parse(spec), *SPECS[spec])
    refuses(lambda: irpe.bucket_ids(spec, GRID))
    refuses(lambda: irpe.build_rpe(spec, head_dim=4, num_heads=2, prefix=1))
    refuses(lambda: irpe.RPEAttention(8, 2, spec, prefix=1))
    model = VisionTransformer(img_size=32, embed_dim=8, depth=1, num_heads=2, num_classes=0)
    refuses(lambda: irpe.attach(model, spec))
    assert not any("lookup_table" in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"ratio": 0}, "ratio=0"),
        ({"ratio": -1}, "ratio=-1"),
        ({"ratio": float("nan")}, "ratio=nan"),
        ({"ratio": float("inf")}, "ratio=inf"),
        ({"ratio": 1e9}, "ratio=1000000000.0"),
        ({"ratio": None}, "ratio=None"),
        ({"ratio": [2]}, "ratio=[2]"),
        ({"ratio": 1j}, "ratio=1j"),
        ({"shared": 7}, "shared=7"),
        ({"shared": None}, "shared=None"),
        ({"on": "K"}, "on='K'"),
        ({"on": ""}, "on=''"),
        ({"on": "vk"}, "on='vk'"),
        ({"on": None}, "on=None"),
        ({"on": ["k"]}, "on=['k']"),
        ({"on": "v", "mode": "bias"}, "on='v'"),
        ({"method": "prodct"}, "method='prodct'"),
        ({"method": None}, "method=None"),
        ({"method": ["product"]}, "method=['product']"),
        ({"mode": "both"}, "mode='both'"),
        ({"index": "linear"}, "index='linear'"),
        ({"beta": "x"}, "beta='x'"),
        ({"alpha": -1}, "alpha=-1"),
        ({"gamma": 0}, "gamma=0"),
    ],
)
def test_spec_fields(fields, says):
    refuses(lambda: irpe.RPE(**fields), says)


@pytest.mark.parametrize("spec", [None, 3, 2.0, ["rpe"], b"rpe-2.0-product-ctx-1-k", object, {}])
def test_specs_of_another_type(spec):
    refuses(lambda: irpe.parse(spec), type(spec).__name__)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: irpe.Grid(0, 4), ("height=0",)),
        (lambda: irpe.Grid(3, -1), ("width=-1",)),
        (lambda: irpe.Grid(3.0, 4), ("height=3.0",)),
        (lambda: irpe.Grid("3", 4), ("height='3'",)),
        (lambda: irpe.Grid(3, None), ("width=None",)),
        (lambda: irpe.Grid(True, 4), ("height=True",)),
        (lambda: irpe.Grid((3, 4), 1), ("(3, 4)",)),
        (lambda: irpe.Grid(3, 4, prefix=-1), ("prefix=-1",)),
        (lambda: irpe.Grid(3, 4, prefix=1.5), ("prefix=1.5",)),
        (lambda: irpe.Grid(3, 4, prefix="1"), ("prefix='1'",)),
        (lambda: irpe.Grid(3, 4, prefix=None), ("prefix=None",)),
        (lambda: irpe.Grid(3, 4, positions=torch.zeros(5)), ("[5]",)),
        (lambda: irpe.Grid(3, 4, positions=torch.zeros(5, 3, dtype=torch.long)), ("3",)),
        (lambda: irpe.Grid(3, 4, positions=[(0, 1)]), ("(0, 1)",)),
        (lambda: irpe.Grid(3, 4).select(torch.tensor([0.0, 1.0])), ("float32",)),
        (lambda: irpe.Grid(3, 4).select(torch.ones(12, dtype=torch.bool)), ("bool",)),
        (lambda: irpe.Grid(3, 4).select([0, 1]), ("[0, 1]",)),
        (lambda: irpe.Grid(3, 4).select(torch.tensor(1)), ("[]",)),
        (
            lambda: irpe.Grid(3, 4).select(torch.tensor([0])).select(torch.tensor([0])),
            ("selection",),
        ),
        (lambda: irpe.Geometry([[0, 0]]), ("[[0, 0]]",)),
        (lambda: irpe.Geometry(None), ("None",)),
        (lambda: irpe.Geometry(torch.zeros(3, 2), torch.zeros(3, 1)), ("2", "1")),
        (lambda: irpe.Geometry(torch.zeros(3, 2), prefix=-2), ("-2",)),
        (lambda: irpe.Geometry(torch.zeros(3, 2), key_prefix=-2), ("-2",)),
        (lambda: irpe.Geometry(torch.zeros(3, 2), key_prefix="a"), ("'a'",)),
        (
            lambda: irpe.Geometry(torch.zeros(2, 3, 2), torch.zeros(4, 3, 2)).batch,
            ("2", "4"),
        ),
        (lambda: irpe.Sequence(0), ("length=0",)),
        (lambda: irpe.Sequence(-3), ("length=-3",)),
        (lambda: irpe.Sequence(2.5), ("length=2.5",)),
        (lambda: irpe.Sequence(None), ("None",)),
        (lambda: irpe.Sequence(5, positions=torch.arange(4)), ("5", "4")),
        (lambda: irpe.Sequence(2, positions=[0, 1]), ("[0, 1]",)),
    ],
)
def test_geometry(make, says):
    refuses(make, *says)


@pytest.mark.parametrize(
    ("geometry", "says"),
    [
        (None, "None"),
        ((3, 4), "(3, 4)"),
        (14, "14"),
        (irpe.Sequence(5), "axes"),
        (irpe.Geometry(torch.zeros(5, 2)), "float32"),
        (irpe.Geometry(torch.zeros(5, 4, dtype=torch.long)), "axes"),
    ],
)
def test_what_image_buckets_need(geometry, says):
    refuses(lambda: irpe.bucket_ids(K, geometry), says)
    for prefix in (True, False):
        rpe_k = irpe.build_rpe(K, head_dim=4, num_heads=2, prefix=int(prefix))[1]
        refuses(lambda rpe_k=rpe_k: rpe_k.terms(geometry)[0].buckets.dense(torch.device("cpu")))


@pytest.mark.parametrize(
    "made",
    [
        lambda p: irpe.Geometry(p.unsqueeze(-1)),
        lambda p: irpe.Geometry(torch.zeros(2, 1), p.unsqueeze(-1)),
        lambda p: irpe.Grid(3, 4, positions=p.expand(2, 2)),
        lambda p: irpe.Sequence(2, positions=p),
        lambda p: irpe.Sequence(2, keys=p),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
def test_positions_are_numbers_on_a_line(made, dtype):
    refuses(lambda: made(torch.zeros(2, dtype=dtype)), str(dtype), "integers or fractions")


def test_sizes_that_no_tensor_has():
    refuses(lambda: irpe.Grid(10**30, 2), "height=1000")
    refuses(lambda: irpe.Sequence(2**63), "length=9223372036854775808")
    refuses(lambda: irpe.Sequence(3, positions=torch.tensor(3)), "[L] or [B, L]", "[]")
    refuses(lambda: irpe.parse("rpe-1000-product-ctx-1-k"), "16008001 buckets", "4194304")
    refuses(lambda: irpe.parse("rpe-10000-rank-ctx-1-k"), "80000 ranks", "65536")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"head_dim": 0}, "head_dim=0"),
        ({"head_dim": 2.0}, "head_dim=2.0"),
        ({"head_dim": None}, "head_dim=None"),
        ({"num_heads": -1}, "num_heads=-1"),
        ({"num_heads": True}, "num_heads=True"),
        ({"num_heads": "2"}, "num_heads='2'"),
        ({"prefix": -1}, "prefix=-1"),
        ({"prefix": None}, "prefix=None"),
    ],
)
def test_build_rpe(given, says):
    arguments = {"head_dim": 4, "num_heads": 2, "prefix": 1}
    refuses(lambda: irpe.build_rpe(K, **{**arguments, **given}), says)


def rpe(spec=K, D=6, H=2, prefix=1, **more):
    modules = irpe.build_rpe(spec, head_dim=D, num_heads=H, prefix=int(prefix), **more)
    return [m for m in modules if m is not None]


def terms(spec=K, geometry=GRID, **more):
    return sum((m.terms(geometry) for m in rpe(spec, **more)), ())


def call(*shapes, terms=None, dtype=torch.float32, **more):
    q, k, v = (torch.zeros(shape, dtype=dtype) for shape in (shapes or [(2, 2, 13, 6)] * 3))
    given = globals()["terms"]() if terms is None else terms
    return run(q, k, v, given, **more)


def run(*args, backend, **more):
    """irpe.attention; or irpe.explain, which must refuse the same."""
    if backend == "explain":
        return irpe.explain(*args, **more)
    return irpe.attention(*args, **more, backend=backend)


ANY = pytest.mark.parametrize("backend", ["reference", "eager", "sdpa", "auto", "explain"])
Z = torch.zeros
ATTENTION = [
    (lambda b: call((2, 13, 6), (2, 13, 6), (2, 13, 6), backend=b), ("[2, 13, 6]",)),
    (lambda b: call((2, 2, 13, 6), (2, 2, 13, 5), (2, 2, 13, 6), backend=b), ("[2, 2, 13, 5]",)),
    (lambda b: call((2, 2, 13, 6), (2, 2, 13, 6), (2, 2, 12, 6), backend=b), ("[2, 2, 12, 6]",)),
    (lambda b: call((2, 2, 13, 6), (1, 2, 13, 6), (1, 2, 13, 6), backend=b), ("[1, 2, 13, 6]",)),
    (lambda b: call((2, 2, 13, 6), (2, 4, 13, 6), (2, 4, 13, 6), backend=b), ("2", "4")),
    (lambda b: call((2, 2, 13, 6), (2, 0, 13, 6), (2, 0, 13, 6), backend=b), ("[2, 0, 13, 6]",)),
    (lambda b: call((1, 1, 3, 0), (1, 1, 3, 0), (1, 1, 3, 5), terms=(), backend=b), ("head dim",)),
    (
        lambda b: call((2, 2, 12, 6), (2, 2, 12, 6), (2, 2, 12, 6), backend=b),
        ("13", "12", "Grid(3, 4"),
    ),
    (lambda b: call((2, 2, 13, 6), (2, 2, 14, 6), (2, 2, 14, 6), backend=b), ("13", "14")),
    (
        lambda b: call((2, 2, 13, 8), (2, 2, 13, 8), (2, 2, 13, 8), backend=b),
        ("[1, 6, 50]", "[1, 8, 50]"),
    ),
    (lambda b: call(terms=terms("rpe-1.9-product-ctx-0-k", H=3), backend=b), ("[3, 6, 50]",)),
    (lambda b: call(terms=terms("rpe-1.9-cross-bias-0-k", H=3), backend=b), ("[3, 8]",)),
    (lambda b: call(dtype=torch.float64, backend=b), ("float32", "float64")),
    (lambda b: call(dtype=torch.bfloat16, backend=b), ("float32", "bfloat16")),
    (lambda b: call(terms=terms(device="meta"), backend=b), ("meta", "cpu")),
    (lambda b: call(terms=terms(dtype=torch.float16), backend=b), ("float16", "float32")),
    (lambda b: call(dtype=torch.int64, terms=(), backend=b), ("int64",)),
    (lambda b: call(dtype=torch.bool, terms=(), backend=b), ("bool",)),
    (lambda b: run(Z(1, 1, 4, 6), Z(1, 1, 4, 6).double(), Z(1, 1, 4, 6), backend=b), ("float64",)),
    (
        lambda b: run(Z(1, 1, 4, 6), Z(1, 1, 4, 6), Z(1, 1, 4, 6, device="meta"), backend=b),
        ("meta",),
    ),
    (lambda b: run(None, Z(1, 1, 4, 6), Z(1, 1, 4, 6), backend=b), ("NoneType",)),
    (lambda b: run(Z(1, 1, 4, 6), [[1.0]], Z(1, 1, 4, 6), backend=b), ("list",)),
    (lambda b: call(terms=terms()[0], backend=b), ("tuple",)),
    (lambda b: call(terms=rpe()[0], backend=b), ("terms(",)),
    (lambda b: call(terms=(rpe()[0],), backend=b), ("terms(",)),
    (lambda b: call(terms=(terms(),), backend=b), ("terms",)),
    (lambda b: call(terms=GRID, backend=b), ("Grid(3, 4",)),
    (lambda b: call(terms="rpe", backend=b), ("rpe",)),
    (lambda b: call(terms=Z(2, 2, 13, 13), backend=b), ("terms",)),
    (lambda b: call(dropout_p=-0.1, backend=b), ("dropout_p=-0.1",)),
    (lambda b: call(dropout_p=1.1, backend=b), ("dropout_p=1.1",)),
    (lambda b: call(dropout_p=float("nan"), backend=b), ("dropout_p=nan",)),
    (lambda b: call(dropout_p="0.1", backend=b), ("dropout_p='0.1'",)),
    (lambda b: call(dropout_p=None, backend=b), ("dropout_p=None",)),
    (lambda b: call(scale="1", backend=b), ("scale='1'",)),
    (lambda b: call(scale=True, backend=b), ("scale=True",)),
    (lambda b: call(is_causal="no", backend=b), ("is_causal='no'",)),
    (lambda b: call(is_causal=None, backend=b), ("is_causal=None",)),
    (lambda b: call(mask=Z(13, 12), backend=b), ("[13, 12]", "[2, 2, 13, 13]")),
    (lambda b: call(mask=Z(2, 13), backend=b), ("[2, 13]", "[2, 2, 13, 13]")),
    (
        lambda b: call(mask=Z(2, 13, 13)[:, None].expand(2, 3, 13, 13), backend=b),
        ("[2, 3, 13, 13]",),
    ),
    (lambda b: call(mask=Z(1, 1, 1, 13, 13), backend=b), ("[1, 1, 1, 13, 13]",)),
    (lambda b: call(mask=Z(13, 13).long(), backend=b), ("int64",)),
    (lambda b: call(mask=Z(13, 13).to(torch.uint8), backend=b), ("uint8",)),
    (lambda b: call(mask=Z(13, 13, dtype=torch.complex64), backend=b), ("complex64",)),
    (lambda b: call(mask=Z(13, 13, device="meta"), backend=b), ("meta",)),
    (lambda b: call(mask=[[True]], backend=b), ("mask", "[[True]]")),
    (lambda b: call(mask="causal", backend=b), ("mask", "'causal'")),
]


@ANY
@pytest.mark.parametrize("number", range(len(ATTENTION)))
def test_attention(number, backend):
    wrong, says = ATTENTION[number]
    refuses(lambda: wrong(backend), *says)


@pytest.mark.parametrize("backend", ["flash", "Auto", "", None, 3, "math", ["auto"]])
def test_unknown_backend(backend):
    says = (repr(backend), "reference", "eager", "sdpa", "auto")
    refuses(lambda: irpe.attention(*[Z(2, 2, 13, 6)] * 3, terms(), backend=backend), *says)
    refuses(lambda: irpe.RPEAttention(8, 2, K, backend=backend, prefix=1), *says)
    refuses(lambda: DeiT(img_size=32, embed_dim=8, depth=1, num_heads=2, backend=backend), *says)
    model = VisionTransformer(img_size=32, embed_dim=8, depth=1, num_heads=2)
    refuses(lambda: irpe.attach(model, K, backend=backend), *says)


def test_sdpa_has_no_value_term():
    spec = "rpe-1.9-product-ctx-1-kv"
    refuses(
        lambda: call(terms=terms(spec), backend="sdpa"), "'sdpa'", "value", "reference", "eager"
    )


@ANY
def test_positions_for_another_batch(backend):
    grid = irpe.Grid(3, 4).select(torch.arange(12).view(3, 4))
    given = terms(geometry=grid, prefix=0)
    refuses(lambda: call(*[(2, 2, 4, 6)] * 3, terms=given, backend=backend), "3", "2")


def test_prefix_of_the_grid_and_of_the_table():
    with_one, without = rpe()[0], rpe(prefix=0)[0]
    refuses(lambda: with_one.terms(irpe.Grid(3, 4)), "Grid(3, 4, prefix=0)", "prefix=0")
    refuses(lambda: without.terms(GRID), "Grid(3, 4, prefix=1)", "prefix=1")


@pytest.mark.parametrize("x", [None, 3, [[1.0]], "x"])
@pytest.mark.parametrize("ids", [torch.zeros(4, 4, dtype=torch.long), None, [[0]]])
def test_lookup_types(x, ids):
    refuses(lambda: irpe.lookup(x, ids), "lookup")


@pytest.mark.parametrize(
    ("x", "ids", "says"),
    [
        (Z(4, 7), Z(4, 4).long(), "[4, 7]"),
        (Z(1, 1, 4, 7), Z(4).long(), "[4]"),
        (Z(1, 1, 4, 7), Z(5, 4).long(), "[5, 4]"),
        (Z(2, 1, 4, 7), Z(3, 4, 4).long(), "[3, 4, 4]"),
        (Z(1, 1, 4, 7), Z(4, 4), "float32"),
        (Z(1, 1, 4, 7), Z(4, 4).bool(), "bool"),
        (Z(1, 1, 4, 7), Z(1, 1, 4, 4).long(), "[1, 1, 4, 4]"),
        (Z(1, 1, 4, 7), Z(4, 4, device="meta").long(), "meta"),
    ],
)
def test_lookup(x, ids, says):
    refuses(lambda: irpe.lookup(x, ids), says)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((8, 3), ("dim=8", "num_heads=3")),
        ((8, 0), ("num_heads=0",)),
        ((8, -2), ("num_heads=-2",)),
        ((8, 2.0), ("num_heads=2.0",)),
        ((0, 2), ("dim=0",)),
        ((8, 2, 7), ("7",)),
    ],
)
def test_layer_arguments(given, says):
    refuses(lambda: irpe.RPEAttention(*given, prefix=1), *says)


@pytest.mark.parametrize("drop", [1.5, -1])
def test_dropout_is_a_probability(drop):
    refuses(lambda: irpe.RPEAttention(8, 2, K, attn_drop=drop), f"attn_drop={drop}")


@pytest.mark.parametrize(
    ("x", "geometry", "says"),
    [
        (Z(2, 13, 8), None, "None"),
        (Z(2, 13, 8), (3, 4), "(3, 4)"),
        (Z(2, 12, 8), GRID, "13"),
        (Z(2, 17, 8), GRID, "17"),
        (Z(13, 8), GRID, "[13, 8]"),
        (Z(2, 13, 9), GRID, "9"),
    ],
)
def test_layer_call(x, geometry, says):
    layer = irpe.RPEAttention(8, 2, K, prefix=1)
    refuses(lambda: layer(x, geometry), says)


def test_layer_without_a_grid():
    layer = irpe.RPEAttention(8, 2, K, prefix=1)
    refuses(lambda: layer(Z(2, 13, 8)), "geometry")


@pytest.mark.parametrize("on", "qkv")
@pytest.mark.parametrize(
    ("x", "size", "says"),
    [
        (Z(1, 2, 13, 13), {}, ("height", "width")),
        (Z(1, 2, 13, 13), {"height": 3}, ("height", "width")),
        (Z(1, 2, 13, 13), {"height": 4, "width": 4}, ("4x4", "13")),
        (Z(1, 2, 13, 13), {"height": 0, "width": 4}, ("height=0",)),
        (Z(1, 2, 13, 13), {"height": 3.0, "width": 4}, ("3.0",)),
        (Z(1, 2, 13, 13), {"height": "3", "width": 4}, ("'3'",)),
        (Z(1, 2, 12, 12), {"height": 3, "width": 4}, ("prefix",)),
        (Z(2, 13, 13), {"height": 3, "width": 4}, ("[2, 13, 13]",)),
        (Z(1, 2, 13, 7), {"height": 3, "width": 4}, ("[1, 2, 13, 7]",)),
        (Z(1, 5, 13, 13), {"height": 3, "width": 4}, ("[1, 5, 13, 13]",)),
        (Z(1, 2, 13, 13).double(), {"height": 3, "width": 4}, ("float64",)),
    ],
)
def test_dense_call(x, size, says, on):
    module = rpe(f"rpe-1.9-product-ctx-0-{on}", D=13)[0]
    refuses(lambda: module(x, **size), *says)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((None, K), "NoneType"),
        (("vit", K), "str"),
        ((nn.Linear(2, 2), K), "Linear"),
        ((lambda: VIT, K, {"where": None}), "None"),
        ((lambda: VIT, K, {"where": 3}), "3"),
        ((lambda: VIT, K, {"where": ["blocks.0.*"]}), "blocks.0.*"),
        ((lambda: VIT, K, {"where": ""}), "''"),
        ((lambda: VIT, {"blocks.0.*": K, "layers.*": K}), "pattern 'layers.*' matches none"),
        ((lambda: VIT, {}), "empty"),
        ((lambda: VIT, {"*": K}, {"where": "blocks.0.*"}), "give one of them"),
        ((lambda: VIT, None), "None"),
    ],
)
def test_attach(given, says):
    model, spec, options = (*given, {})[:3]
    model = model() if isinstance(model, types.FunctionType) else model
    refuses(lambda: irpe.attach(model, spec, **options), says)


VIT = VisionTransformer(img_size=32, embed_dim=8, depth=1, num_heads=2, num_classes=0)


@pytest.mark.parametrize("model", [None, "vit", nn.Linear(2, 2), VIT])
def test_detach_and_param_groups(model):
    refuses(lambda: irpe.detach(model), type(model).__name__)
    refuses(lambda: irpe.param_groups(model), type(model).__name__)
