"""irpe.build and irpe.encodings_of: every spec; copies, devices, compilers, exporters."""

import copy
import io
import pickle

import pytest
import torch
from common import refuses
from text import F64
from torch import nn

import irpe
from irpe.encodings import SPECS as NAMES

# spec: (attribute names, parameters and their shapes) for 12 channels, 2 heads, no prefix
MADE = {
    "rpe-1.9-product-ctx-1-kv": {
        "rpe_k.lookup_table_weight": (1, 6, 49), "rpe_v.lookup_table_weight": (1, 49, 6)
    },
    "rope": {"rope": None},
    "rope,layout=half,fraction=0.34": {"rope": None},
    "rope-axial": {"rope": None},
    "rope-mixed": {"rope.frequencies": (2, 2, 4)},
    "sinusoidal": {"sinusoidal": None},
    "learned,length=20": {"learned.weight": (20, 12)},
    "learned,length=5,interpolate=corners,to=20": {"learned.weight": (5, 12)},
    "shaw,clip=3": {"shaw.table_k": (1, 6, 7)},
    "shaw,clip=3,on=kv,shared=0": {"shaw.table_k": (2, 6, 7), "shaw.table_v": (2, 7, 6)},
    "huang1,clip=3": {"huang.table": (1, 4)},
    "huang2,clip=3,shared=0": {"huang.table": (2, 7)},
    "huang3,clip=3": {"huang.table": (1, 6, 7)},
    "huang4,clip=3,shared=0": {"huang.table": (2, 6, 7)},
    "t5,buckets=8,max=20": {"t5.table": (2, 8)},
    "alibi": {"alibi": None},
    "pia": {"pia": None},
    "cpb,hidden=5": {
        "cpb.fc1.weight": (5, 2), "cpb.fc1.bias": (5,), "cpb.fc2.weight": (2, 5),
    },
    "decomposed,size=3,width=4": {
        "decomposed.rel_pos_h": (5, 6), "decomposed.rel_pos_w": (7, 6),
    },
    "lookhere": {"lookhere": None},
    "t5-axes,buckets=8,max=20": {"t5.table": (2, 2, 8)},
}  # fmt: skip
DIM = {"rope,layout=half,fraction=0.34": 200, "rope-axial": 16, "rope-mixed": 16}


def build(spec, dtype=F64, **options):
    return irpe.build(spec, dim=DIM.get(spec, 12), num_heads=2, dtype=dtype, **options)


@pytest.mark.parametrize("spec", MADE)
def test_names_and_shapes(spec):
    made = build(spec)
    assert made.keys() == {name.partition(".")[0] for name in MADE[spec]}
    shapes = {n: tuple(p.shape) for n, p in nn.ModuleDict(made).state_dict().items()}
    assert shapes == {name: shape for name, shape in MADE[spec].items() if shape is not None}
    assert all(isinstance(module, irpe.Encoding) for module in made.values())
    assert str(spec) in "".join(map(str, made.values())) or "rpe-" in spec
    with_prefix = nn.ModuleDict(build(spec, prefix=1)).state_dict()
    relative = spec.partition(",")[0] in ("shaw", "huang1", "huang2", "huang3", "huang4", "t5")
    for name, shape in shapes.items():
        more = sum(with_prefix[name].shape) - sum(shape)
        assert more == int(relative or "rpe-" in spec)


def test_every_spec_is_built():
    assert {spec.partition(",")[0] for spec in MADE} - {"rpe-1.9-product-ctx-1-kv"} == {*NAMES} - {
        "rpe"
    }


def test_who_shares_among_layers_and_who_decays():
    sharing = {spec for spec in MADE if any(m.one_for_all for m in build(spec).values())}
    assert sharing == {"t5,buckets=8,max=20"}
    assert {s for s in MADE if not all(m.decays for m in build(s).values())} == {"rope-mixed"}


def layer_of(spec, causal=False, **options):
    torch.manual_seed(1)
    dim = DIM.get(spec, 12)
    options = {"dtype": F64, "prefix": 0, **options}
    layer = irpe.RPEAttention(dim, 2, spec, causal=causal, **options)
    for name, p in layer.named_parameters():
        if "table" in name:
            nn.init.normal_(p)
    return layer


ON_GRID = {spec for spec in MADE if 1 not in irpe.parse(spec).axes}


def place(spec):
    return irpe.Grid(3, 3) if spec in ON_GRID else irpe.Sequence(9)


ON_ATTENTION = [spec for spec in MADE if not irpe.parse(spec).at_input]


@pytest.mark.parametrize("spec", ON_ATTENTION)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_state_dicts(spec, copied):
    layer, geometry = layer_of(spec), place(spec)
    x = torch.randn(2, 9, DIM.get(spec, 12), dtype=F64)
    wanted = layer(x, geometry)
    assert torch.equal(copied(layer)(x, geometry), wanted)
    other = irpe.RPEAttention(DIM.get(spec, 12), 2, spec, prefix=0, dtype=F64)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x, geometry), wanted)
    assert torch.equal(layer(x, copied(geometry)), wanted)


@pytest.mark.parametrize("spec", ON_ATTENTION)
def test_on_the_meta_device_first(spec):
    made = layer_of(spec, device="meta")
    x = torch.randn(2, 9, DIM.get(spec, 12), dtype=F64)
    assert made(x.to("meta"), place(spec)).shape == x.shape
    layer = layer_of(spec)
    made = made.to_empty(device="cpu")
    for module in made.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    made.load_state_dict(layer.state_dict())
    assert torch.equal(made(x, place(spec)), layer(x, place(spec)))


@pytest.mark.parametrize("spec", [s for s in MADE if irpe.parse(s).at_input])
def test_input_embeddings_on_the_meta_device_first(spec):
    (made,) = build(spec, device="meta").values()
    assert made.embed(torch.zeros(2, 9, 12, device="meta"), irpe.Sequence(9)).shape == (2, 9, 12)
    made.to_empty(device="cpu")
    if hasattr(made, "reset_parameters"):
        made.reset_parameters()
    out = made.embed(torch.zeros(2, 9, 12, dtype=F64), irpe.Sequence(9))
    assert torch.isfinite(out).all() and out.std() > 0


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    ("spec", "causal"),
    [
        *((spec, False) for spec in ON_ATTENTION),
        *((spec, True) for spec in ("rope", "alibi", "t5,buckets=8,max=20", "huang3,clip=3")),
    ],
)
def test_compiled(spec, causal):
    """One graph, forward and backward, with the geometry made inside of it or outside."""
    layer, outside = layer_of(spec, causal), place(spec)
    x = torch.randn(2, 9, DIM.get(spec, 12), dtype=F64, requires_grad=True)

    def inside(x):
        return layer(x, place(spec))

    inputs = [x, *layer.parameters()]
    wanted = layer(x, outside)
    wanted_grads = torch.autograd.grad(wanted.square().sum(), inputs)
    call = inside if causal else lambda x: layer(x, outside)
    found = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    grads = torch.autograd.grad(found.square().sum(), inputs)
    for a, b in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert torch.equal(layer(x, outside), wanted), "what eager keeps is not a tracer's"


@pytest.mark.cases(1)
@pytest.mark.parametrize("spec", ["rope", "alibi", "shaw,clip=3", "t5,buckets=8,max=20"])
def test_compiles_for_any_length(spec):
    layer, graphs = layer_of(spec, True), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x: layer(x, irpe.Sequence(x.shape[1])), fullgraph=True, backend=backend
    )
    for length in (9, 12, 31, 7, 50):
        x = torch.randn(2, length, 12, dtype=F64)
        wanted = layer(x, irpe.Sequence(length))
        torch.testing.assert_close(compiled(x), wanted, rtol=1e-10, atol=1e-10)
    assert len(graphs) <= 2


class Model(nn.Module):
    """A layer that makes its own geometry."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, irpe.Sequence(x.shape[1]))


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    ("spec", "causal", "dynamic"),
    [
        *((spec, True, True) for spec in ON_ATTENTION if spec not in ON_GRID),
        ("rope", False, False),
        ("alibi", False, True),
        ("alibi", True, False),
        ("t5,buckets=8,max=20", False, True),
    ],
)
def test_exported(spec, causal, dynamic):
    dim = DIM.get(spec, 12)
    model, x = Model(layer_of(spec, causal)), torch.randn(2, 9, dim, dtype=F64)
    shapes = ({1: torch.export.Dim("length", min=2, max=4096)},) if dynamic else None
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    kept = io.BytesIO()
    torch.export.save(program, kept)
    kept.seek(0)
    again = torch.export.load(kept).module()
    for length in (9, 33) if dynamic else (9,):
        y = torch.randn(2, length, dim, dtype=F64)
        torch.testing.assert_close(again(y), model(y), rtol=1e-10, atol=1e-10)


@pytest.mark.cases(1)
@pytest.mark.parametrize("spec", ["rope-axial", "rope-mixed", "alibi"])
def test_exported_on_a_grid(spec):
    layer = layer_of(spec)

    class Pictures(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x.flatten(1, 2), irpe.Grid(x.shape[1], x.shape[2]))

    x = torch.randn(2, 3, 4, DIM.get(spec, 12), dtype=F64)
    height, width = (torch.export.Dim(n, min=2, max=64) for n in ("height", "width"))
    program = torch.export.export(Pictures(), (x,), dynamic_shapes=({1: height, 2: width},))
    for size in ((3, 4), (5, 7)):
        y = torch.randn(2, *size, DIM.get(spec, 12), dtype=F64)
        torch.testing.assert_close(program.module()(y), Pictures()(y), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spec", [s for s in ON_ATTENTION if 1 in irpe.parse(s).axes])
def test_gradients_per_sample(spec):
    """torch.func over a layer: vmap of grad, and forward mode."""
    layer = layer_of(spec, True)
    parameters = dict(layer.named_parameters())
    xs = torch.randn(3, 5, DIM.get(spec, 12), dtype=F64)

    def loss(parameters, x):
        out = torch.func.functional_call(layer, parameters, (x.unsqueeze(0), irpe.Sequence(5)))
        return out.square().sum()

    found = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, xs)
    for i, x in enumerate(xs):
        wanted = torch.autograd.grad(loss(parameters, x), list(parameters.values()))
        for a, b in zip(found.values(), wanted, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-9, atol=1e-10)


def test_inference_mode_first_then_training():
    for spec in ON_ATTENTION:
        layer, geometry = layer_of(spec), place(spec)
        x = torch.randn(2, 9, DIM.get(spec, 12), dtype=F64)
        with torch.inference_mode():
            wanted = layer(x, geometry)
        out = layer(x, geometry)
        out.sum().backward()
        torch.testing.assert_close(out, wanted.clone(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spec", ON_ATTENTION)
def test_autocast_and_low_precision(spec):
    layer, geometry = layer_of(spec, dtype=torch.float32), place(spec)
    x = torch.randn(2, 9, DIM.get(spec, 12))
    wanted = layer(x, geometry)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x, geometry)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), wanted, rtol=0.1, atol=0.1)
    low = layer.bfloat16()(x.bfloat16(), place(spec))
    torch.testing.assert_close(low.float(), wanted, rtol=0.1, atol=0.15)


def test_several_encodings_on_one_layer():
    """Hooks run one after the other: rotary with a bias, or an infused one with a table."""
    layer = layer_of("rope")
    layer.t5 = build("t5,buckets=8,max=20")["t5"]
    nn.init.normal_(layer.t5.table)
    x, geometry = torch.randn(2, 9, 12, dtype=F64), irpe.Sequence(9)
    found = layer(x, geometry)
    hooks = irpe.encodings_of(layer)
    assert hooks.encodings == (layer.rope, layer.t5)
    q, k, v = layer.qkv(x).view(2, 9, 3, 2, 6).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = layer.rope.transform(q, k, geometry)
    out = irpe.attention(q, k, v, layer.t5.terms(geometry), backend="reference")
    torch.testing.assert_close(found, layer.proj(out.transpose(1, 2).flatten(2)))
    assert hooks.embed(x, geometry) is x and hooks.inputs(x, x, geometry) == (x, x)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"dim": 12, "num_heads": 5}, ("dim=12", "num_heads=5")),
        ({"dim": 0, "num_heads": 2}, ("dim=0",)),
        ({"dim": 12.0, "num_heads": 2}, ("dim=12.0",)),
        ({"dim": 12, "num_heads": True}, ("num_heads=True",)),
        ({"dim": 12, "num_heads": 2, "head_dim": -1}, ("head_dim=-1",)),
        ({"dim": 12, "num_heads": 2, "prefix": -1}, ("prefix=-1",)),
        ({"dim": 12, "num_heads": 2, "prefix": "yes"}, ("prefix='yes'",)),
    ],
)
def test_build_arguments(given, says):
    refuses(lambda: irpe.build("shaw", **given), *says)


def test_head_dim_of_its_own():
    made = irpe.build("shaw,clip=3", dim=10, num_heads=4, head_dim=6)["shaw"]
    assert made.table_k.shape == (1, 6, 7)


def test_layers_refuse_what_belongs_at_the_input():
    for spec in ("sinusoidal", "learned,length=9"):
        refuses(lambda s=spec: irpe.RPEAttention(12, 2, s, prefix=1), spec, "input", "irpe.build")
    refuses(lambda: irpe.build_rpe("rope", head_dim=6, num_heads=2, prefix=0), "rope", "build")
    refuses(lambda: irpe.bucket_ids("rope", irpe.Sequence(4)), "rope", "no buckets", "t5")


def test_a_causal_t5_that_has_no_room():
    refuses(lambda: build("t5,buckets=32,max=12", causal=True), "max=12", "16")
    build("t5,buckets=32,max=12")


@pytest.mark.parametrize("spec", ["shaw,clip=3", "huang2,clip=3", "t5,buckets=8,max=20"])
def test_tables_know_whether_there_are_prefix_tokens(spec):
    (bare,), (own,) = build(spec).values(), build(spec, prefix=1).values()
    refuses(lambda: bare.terms(irpe.Sequence(9, prefix=1)), "prefix=1")
    refuses(lambda: own.terms(irpe.Sequence(9)), "prefix=0")
    refuses(lambda: bare.terms(irpe.Grid(3, 3))[0].buckets.dense(torch.device("cpu")), "one axis")
    halves = irpe.Sequence(9, positions=torch.arange(9) / 2)
    refuses(lambda: bare.terms(halves)[0].buckets.dense(torch.device("cpu")), "integer", "float32")


@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa"])
@pytest.mark.parametrize("tables", ["shaw,clip=3", "huang4,clip=3", "shaw,clip=3 + huang4,clip=3"])
def test_tables_read_queries_before_their_rotation(tables, backend):
    """logits = s Rq . Rk + s q . r + s k . r', also with cached keys."""
    torch.manual_seed(2)
    owner, plain, rotary = nn.Module(), nn.Module(), nn.Module()
    for module, spec in ((owner, f"rope + {tables}"), (plain, tables), (rotary, "rope")):
        for name, encoding in irpe.build(spec, dim=16, num_heads=2, dtype=F64).items():
            setattr(module, name, encoding)
    for a, b in zip(owner.parameters(), plain.parameters(), strict=True):
        b.data = nn.init.normal_(a).data
    q, k, v = (torch.randn(2, 2, 9, 8, dtype=F64, requires_grad=True) for _ in range(3))
    text, where = irpe.Sequence(9), torch.arange(9)
    one, other, turn = (irpe.encodings_of(m) for m in (owner, plain, rotary))
    rq, rk = turn.transform(q, k, text)
    eye = torch.eye(9, dtype=F64).expand(2, 2, -1, -1)
    given = {"scale": 8**-0.5, "backend": "reference"}
    added = irpe.attention(q, k, eye, other.terms(text), **given).log()
    added = added - irpe.attention(q, k, eye, **given).log()  # up to a constant of each row
    wanted = ((rq @ rk.mT) * 8**-0.5 + added).softmax(-1) @ v
    parts = [irpe.Sequence(n, positions=p) for n, p in ((4, where[:4]), (5, where[4:]))]
    pieces = [
        one.transform(q[:, :, p], k[:, :, p], at)
        for p, at in zip((slice(4), slice(4, 9)), parts, strict=True)
    ]
    keys = torch.cat([piece[1] for piece in pieces], 2)
    queries = torch.cat([piece[0] for piece in pieces], 2)
    found = irpe.attention(queries, keys, v, one.terms(text), scale=8**-0.5, backend=backend)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    ours, theirs = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (found, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_scales_per_channel_refuse_rotated_queries():
    owner = nn.Module()
    for name, encoding in irpe.build("rope + huang3,clip=2", dim=16, num_heads=2).items():
        setattr(owner, name, encoding)
    refuses(lambda: irpe.encodings_of(owner).terms(irpe.Sequence(3)), "rope + huang3", "channel")
