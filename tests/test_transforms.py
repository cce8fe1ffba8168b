"""What torch does to a call: compile, export, functorch, inference mode, meta, autocast."""

import copy
import io

import numpy as np
import pytest
import torch
from common import TILES
from oracles.precision import assert_as_good
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import irpe
from models.deit import DeiT

F64 = torch.float64
SMALL = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
SIZES = [
    (64, 64),
    (32, 64),
    (64, 32),
    (48, 48),
    (80, 48),
    (96, 32),
    (48, 96),
    (80, 80),
    (112, 64),
    (64, 96),
]


def fill(model):
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lookup_table" in name:
            nn.init.normal_(p, std=0.5)
        elif "qkv.weight" in name or "proj.weight" in name:
            nn.init.normal_(p, std=0.2)
    return model


def deit(spec, **options):
    return fill(DeiT(**{**SMALL, "num_classes": 5, **options}, rpe=spec))


def attached(spec, **options):
    model = VisionTransformer(**{**SMALL, "num_classes": 5, **options})
    irpe.attach(model, spec)
    return fill(model)


def modules(spec, D=6, H=2, prefix=1, dtype=F64):
    made = [
        m
        for m in irpe.build_rpe(spec, head_dim=D, num_heads=H, prefix=int(prefix), dtype=dtype)
        if m
    ]
    for m in made:
        for p in m.parameters():
            nn.init.normal_(p)
    return nn.ModuleList(made)


def joined(made, geometry):
    return sum((m.terms(geometry) for m in made), ())


def qkv(B=2, H=2, L=13, D=6, dtype=F64):
    return [torch.randn(B, H, L, D, dtype=dtype, requires_grad=True) for _ in range(3)]


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    "spec", ["rpe-1.9-product-ctx-0-qkv", "rpe-1.9-cross-bias-1-qk", "rpe-5.0-rank-ctx-1-k"]
)
def test_compiled_call(spec):
    made, (q, k, v) = modules(spec), qkv()
    mask = torch.ones(13, 13, dtype=torch.bool).tril()
    mask[3] = False

    def call(q, k, v, height, width):
        grid = irpe.Grid(height, width, prefix=1)
        return irpe.attention(q, k, v, joined(made, grid), mask=mask)

    inputs = [q, k, v, *made.parameters()]
    wanted = call(q, k, v, 3, 4)
    wanted_grads = torch.autograd.grad(wanted.square().sum(), inputs)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found = compiled(q, k, v, 3, 4)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    grads = torch.autograd.grad(found.square().sum(), inputs)
    for a, b in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_compiled_by_inductor():
    made, (q, k, v) = (
        modules("rpe-1.9-product-ctx-1-qkv", dtype=torch.float32),
        qkv(dtype=torch.float32),
    )

    def call(q, k, v):
        return irpe.attention(q, k, v, joined(made, irpe.Grid(3, 4, prefix=1)))

    wanted = call(q, k, v)
    found = torch.compile(call, fullgraph=True)(q, k, v)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    grad, other = (torch.autograd.grad(x.sum(), q)[0] for x in (found, wanted))
    torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5)


def counting():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend, graphs


def compiles(model, training, sizes):
    torch._dynamo.reset()
    backend, graphs = counting()
    model.train(training)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for size in sizes:
        x = torch.randn(2, 3, *size)
        with torch.set_grad_enabled(training):
            found = compiled(x)
            torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-4)
        if training:
            found.sum().backward()
    return len(graphs)


@pytest.mark.full
@pytest.mark.parametrize("training", [False, True])
def test_deit_compiles_at_most_three_times_over_ten_sizes(training):
    assert 1 <= compiles(deit("rpe-1.9-product-ctx-1-qkv", depth=1), training, SIZES) <= 3


@pytest.mark.full
@pytest.mark.parametrize("training", [False, True])
def test_attach_compiles_no_more_often_than_the_plain_model(training):
    """timm's own resizing makes a graph for each size; the encoding must not add to them."""
    options = {"dynamic_img_size": True, "depth": 1}
    model = fill(VisionTransformer(**{**SMALL, "num_classes": 5, **options}))
    plain = compiles(model, training, SIZES[:4])
    encoded = attached("rpe-1.9-product-ctx-1-qkv", **options)
    assert compiles(encoded, training, SIZES[:4]) <= plain
    assert compiles(encoded, training, SIZES[:1] * 3) == 1


@pytest.mark.full
@pytest.mark.parametrize("make", [deit, attached])
def test_compiled_model_in_full(make):
    """The default compiler, forward and backward, against eager."""
    model = make("rpe-1.9-product-ctx-1-qk", depth=1).train()
    x = torch.randn(2, 3, 64, 64)
    model(x).square().sum().backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    out = torch.compile(model, fullgraph=True)(x)
    torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4)
    out.square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.cases(1)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", [deit, attached])
@pytest.mark.parametrize("on", ["k", "qk", "qkv"])
def test_export(on, make, training):
    """Gradients on, as a script that forgets no_grad does; then eager mode works as before."""
    model = make(f"rpe-1.9-product-ctx-1-{on}").train(training)
    x = torch.randn(2, 3, 64, 64)
    wanted = model(x)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), wanted, rtol=1e-5, atol=1e-5)
    again = model(x)
    assert torch.equal(again, wanted)
    again.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if "lookup" in n)


@pytest.mark.cases(1)
@pytest.mark.parametrize("strict", [False, True])
def test_export_for_any_size(strict):
    model = deit("rpe-1.9-product-ctx-1-qk", depth=1).eval()
    rows, columns = (
        torch.export.Dim("rows", min=2, max=30),
        torch.export.Dim("columns", min=2, max=30),
    )
    shapes = ({2: 16 * rows, 3: 16 * columns},)
    program = torch.export.export(
        model, (torch.randn(2, 3, 80, 48),), dynamic_shapes=shapes, strict=strict
    )
    for size in ((80, 48), (48, 112), (32, 32), (64, 64), (64, 32)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    ("make", "on", "training"),
    [(attached, "k", False), (attached, "qk", False), (attached, "qkv", True), (deit, "k", True)]
    + [(deit, "qk", True), (deit, "qkv", True), (deit, "qkv", False)],
)
def test_onnx(on, make, training):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = make(f"rpe-1.9-product-ctx-1-{on}", depth=1).train(training)
    x = torch.randn(2, 3, 64, 64)
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("spec", ["rpe-1.9-product-ctx-0-qkv", "rpe-1.9-cross-bias-0-qk"])
def test_functorch(spec, backend):
    made, inputs = modules(spec), qkv()
    grid = irpe.Grid(3, 4, prefix=1)
    names = [n for n, _ in made.named_parameters()]
    tables = [p for _, p in made.named_parameters()]

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.made = made

        def forward(self, q, k, v):
            return irpe.attention(q, k, v, joined(self.made, grid), backend=backend)

    whole = Whole()

    def loss(q, k, v, *given):
        state = {f"made.{n}": t for n, t in zip(names, given, strict=True)}
        return torch.func.functional_call(whole, state, (q, k, v)).square().sum()

    everything = [*inputs, *tables]
    wanted = torch.autograd.grad(loss(*everything), everything)
    found = torch.func.grad(loss, argnums=tuple(range(len(everything))))(*everything)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)

    one_by_one = torch.func.vmap(lambda q, k, v: whole(q[None], k[None], v[None])[0])
    torch.testing.assert_close(one_by_one(*inputs), whole(*inputs), rtol=1e-10, atol=1e-10)
    whole(*inputs).sum().backward()

    each = torch.func.vmap(
        torch.func.grad(lambda q, k, v: loss(q[None], k[None], v[None], *tables))
    )
    torch.testing.assert_close(each(*inputs), wanted[0], rtol=1e-10, atol=1e-10)
    tangents = tuple(torch.randn_like(x) for x in everything)
    _, slope = torch.func.jvp(loss, tuple(everything), tangents)
    along = sum((g * t).sum() for g, t in zip(wanted, tangents, strict=True))
    torch.testing.assert_close(slope, along, rtol=1e-9, atol=1e-9)


def test_eager_says_that_it_cannot_be_transformed():
    made, (q, k, v) = modules("rpe-1.9-product-ctx-1-k"), qkv()
    terms = joined(made, irpe.Grid(3, 4, prefix=1))

    def loss(q):
        return irpe.attention(q, k, v, terms, backend="eager").sum()

    with pytest.raises(irpe.IrpeError, match="eager"):
        torch.func.grad(loss)(q)


def test_forward_mode():
    """Dual numbers by torch.autograd.forward_ad: right on auto, or refused."""
    made, (q, k, v) = modules("rpe-1.9-product-ctx-1-k"), [x.detach() for x in qkv()]
    grid = irpe.Grid(3, 4, prefix=1)
    tangent = torch.randn_like(q)

    def call(x, backend="reference"):
        return irpe.attention(x, k, v, joined(made, grid), backend=backend)

    wanted = torch.func.jvp(call, (q,), (tangent,))[1]
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        dual = torch.autograd.forward_ad.make_dual(q, tangent)
        found = torch.autograd.forward_ad.unpack_dual(call(dual, "auto")).tangent
    assert found is not None
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["auto", "reference", "eager", *TILES, "sdpa"])
def test_inference_mode_then_training(backend):
    made, inputs = modules("rpe-1.9-product-ctx-1-qk"), qkv()
    grid = irpe.Grid(3, 4, prefix=1)
    with torch.inference_mode():
        first = irpe.attention(*inputs, joined(made, grid), backend=backend)
    out = irpe.attention(*inputs, joined(made, grid), backend=backend)
    torch.testing.assert_close(out, first)
    out.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in made.parameters())
    with torch.inference_mode():
        torch.testing.assert_close(
            irpe.attention(*inputs, joined(made, grid), backend=backend), first
        )


@pytest.mark.parametrize("backend", ["auto", "reference", "eager", *TILES])
def test_meta(backend):
    with torch.device("meta"):
        layer = irpe.RPEAttention(12, 2, "rpe-1.9-product-ctx-0-qkv", backend=backend, prefix=1)
    assert all(p.is_meta for p in layer.parameters())
    grid = irpe.Grid(3, 4, prefix=1)
    assert layer(torch.randn(2, 13, 12, device="meta"), grid).shape == (2, 13, 12)
    state = irpe.RPEAttention(12, 2, "rpe-1.9-product-ctx-0-qkv", prefix=1).state_dict()
    real = layer.to_empty(device="cpu")
    real.load_state_dict(state)
    x = torch.randn(2, 13, 12)
    other = irpe.RPEAttention(12, 2, "rpe-1.9-product-ctx-0-qkv", backend=backend, prefix=1)
    other.load_state_dict(state)
    torch.testing.assert_close(real(x, grid), other(x, irpe.Grid(3, 4, prefix=1)))


def test_tables_from_meta_are_reset_to_zero():
    made = irpe.build_rpe(
        "rpe-1.9-product-ctx-1-k", head_dim=4, num_heads=2, prefix=1, device="meta"
    )[1]
    made = made.to_empty(device="cpu")
    made.table.data.fill_(7.0)
    made.reset_parameters()
    assert (made.table == 0).all()


def test_attach_on_meta():
    with torch.device("meta"):
        model = VisionTransformer(**SMALL, num_classes=5)
        irpe.attach(model, "rpe-1.9-product-ctx-1-qkv")
    assert all(p.is_meta for p in model.parameters())
    assert model(torch.randn(2, 3, 64, 64, device="meta")).shape == (2, 5)


@pytest.mark.parametrize("backend", ["auto", "reference", "eager", *TILES, "sdpa"])
@pytest.mark.parametrize("shared", [0, 1])
def test_autocast(shared, backend):
    """In bfloat16, as exact as plain torch; parameters get float32 gradients."""
    on = "qk" if backend == "sdpa" else "qkv"
    made = modules(f"rpe-1.9-product-ctx-{shared}-{on}", D=12, dtype=torch.float32)
    inputs = qkv(D=12, dtype=torch.float32)
    grid = irpe.Grid(3, 4, prefix=1)
    with torch.autocast("cpu", torch.bfloat16):
        out = irpe.attention(*inputs, joined(made, grid), backend=backend)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.float().square().sum(), [*inputs, *made.parameters()])
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)
    exact = irpe.attention(
        *(x.detach().double() for x in inputs), joined(copy.deepcopy(made).double(), grid)
    )
    low = irpe.attention(
        *(x.detach().bfloat16() for x in inputs),
        joined(copy.deepcopy(made).bfloat16(), grid),
        backend="reference",
    )
    assert_as_good(out, low, exact)
    mask = torch.zeros(13, 13)
    mask[4] = -torch.inf
    with torch.autocast("cpu", torch.bfloat16):
        masked = irpe.attention(*inputs, joined(made, grid), mask=mask, backend=backend)
    assert (masked[:, :, 4] == 0).all() and masked.isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "reference", "eager", *TILES, "sdpa"])
def test_autocast_leaves_float64(backend):
    made, inputs, grid = modules("rpe-1.9-product-ctx-1-k"), qkv(), irpe.Grid(3, 4, prefix=1)
    wanted = irpe.attention(*inputs, joined(made, grid), backend=backend)
    for _ in range(2):  # the second call is known
        with torch.autocast("cpu", torch.bfloat16):
            found = irpe.attention(*inputs, joined(made, grid), backend=backend)
        assert wanted.dtype == found.dtype == torch.float64 and torch.equal(found, wanted)


@pytest.mark.parametrize("backend", ["reference", "eager", *TILES])
def test_backward_inside_of_autocast(backend):
    """Not recommended, often done: the backward pass runs under autocast as well."""
    made, inputs = (
        modules("rpe-1.9-product-ctx-1-qkv", dtype=torch.float32),
        qkv(dtype=torch.float32),
    )
    grid = irpe.Grid(3, 4, prefix=1)
    everything = [*inputs, *made.parameters()]
    out = irpe.attention(*inputs, joined(made, grid), backend=backend)
    wanted = torch.autograd.grad(out.square().sum(), everything)
    with torch.autocast("cpu", torch.bfloat16):
        out = irpe.attention(*inputs, joined(made, grid), backend=backend)
        found = torch.autograd.grad(out.float().square().sum(), everything)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.05 * float(b.abs().max()))
    out = irpe.attention(*inputs, joined(made, grid), backend=backend)  # float32, recorded outside
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(out.square().sum(), everything)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.05 * float(b.abs().max()))


def test_low_precision_models_move_without_losing_meaning():
    """No buffer whose meaning .to(bfloat16) destroys, in either direction."""
    model = attached("rpe-33.0-quant-ctx-1-k", img_size=256).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
        x = torch.randn(1, 3, 256, 256)
        wanted = model(x)
        model.bfloat16()
        assert model(x.bfloat16()).isfinite().all()
        assert torch.equal(model.float()(x), wanted)
    assert not list(model.buffers())
