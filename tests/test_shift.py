"""Relative means relative: a shift of all positions changes nothing beyond rounding."""

import dataclasses
import itertools
import math

import pytest
import torch
from oracles import text as plain
from oracles.precision import assert_as_good
from text import oracle

import irpe
from models.text import Cache, CausalLM

F64 = torch.float64
SHIFTS = (10**7, 3, -5)
H, D = 3, 16

TEXT = (
    "alibi",
    "alibi,span=4",
    "rope",
    "rope,layout=half,fraction=0.5",
    "rope,scaling=linear,factor=4",
    "rope,scaling=ntk,factor=4",
    "rope,scaling=yarn,factor=4,original=64",
    "t5,buckets=8,max=20",
    "t5,buckets=8,max=20,bidirectional=0",
    "shaw,clip=5",
    "shaw,clip=5,on=kv,shared=0",
    "huang1,clip=5",
    "huang2,clip=5",
    "huang3,clip=5",
    "huang4,clip=5",
    "rope + t5,buckets=8,max=20",
    "alibi + shaw,clip=5",
    "rope + huang1,clip=5 + alibi",
)
RPE = tuple(
    f"rpe-1.9-{method}-{mode}-0-{on}"
    for method, (mode, on) in itertools.product(
        ("euc", "quant", "rank", "cross", "product"),
        (*((mode, on) for mode in ("bias", "ctx") for on in ("q", "k", "qk")), ("ctx", "qkv")),
    )
)
IMAGE = (
    *RPE,
    "alibi",
    "rope-axial",
    "rope-axial,layout=half,order=xy",
    "rope-mixed",
    "rope-axial + rpe-1.9-product-bias-0-k",
    "rope-mixed + rpe-1.9-cross-bias-0-qk + alibi",
)
# Queries and keys are rotated before these terms read them, so their logits depend on positions.
CONTENT = ("rope + shaw,clip=5", "rope-axial + rpe-1.9-product-ctx-1-k")
PATCHES = torch.tensor([(r, c) for r in range(5) for c in range(7) if (r, c) != (2, 3)])


def holder(spec, dtype, causal=False):
    """A module with the encodings of a spec, tables drawn at random and rounded to a dtype."""
    torch.manual_seed(1)
    made = irpe.build(spec, dim=H * D, num_heads=H, causal=causal, dtype=torch.float32)
    module = torch.nn.ModuleDict(made)
    for name, p in module.named_parameters():
        if "frequencies" not in name:
            torch.nn.init.normal_(p, 1.0 if "huang" in name and spec != "huang4" else 0.0, 0.3)
    return module.to(dtype)


def inputs(queries, keys, dtype):
    torch.manual_seed(2)
    shapes = ((2, H, queries, D), (2, H, keys, D), (2, H, keys, D))
    return [torch.randn(s).to(dtype).requires_grad_() for s in shapes]


def attend(module, q, k, v, geometry, causal=False, backend="auto"):
    encodings = irpe.encodings_of(module)
    q, k = encodings.transform(q, k, geometry)
    return irpe.attention(
        q, k, v, encodings.terms(geometry), is_causal=causal, scale=D**-0.5, backend=backend
    )


def outcome(module, qkv, geometry, **given):
    """Output, and gradients of q, k, v and all tables, by name."""
    out = attend(module, *qkv, geometry, **given)
    torch.manual_seed(3)
    weight = torch.randn(out.shape).to(out.dtype)
    wanted = dict(zip("qkv", qkv, strict=True)) | dict(module.named_parameters())
    grads = torch.autograd.grad((out * weight).sum(), list(wanted.values()))
    return {"out": out.detach()} | dict(zip(wanted, grads, strict=True))


def text(queries, keys, shift=0):
    return irpe.Sequence(len(queries), positions=queries + shift, keys=keys + shift)


def patches(shift=0):
    return irpe.Grid(5, 7, positions=PATCHES + shift)


def check(spec, geometries, dtype, causal=False, names=None):
    """Shifted outcomes are the unshifted one, to twice its own distance from float64."""
    near, *far = geometries
    module, exact = holder(spec, dtype, causal), holder(spec, dtype, causal).to(F64)
    qkv = inputs(near.query_length, near.key_length, dtype)
    wide = [x.detach().to(F64).requires_grad_() for x in qkv]
    truth = outcome(exact, wide, near, causal=causal, backend="reference")
    found = outcome(module, qkv, near, causal=causal)
    for geometry in far:
        moved = outcome(module, qkv, geometry, causal=causal)
        for name in names or [n for n in truth if "frequencies" not in n]:
            within(moved[name], found[name], truth[name], spec, name)


def within(moved, found, truth, spec, name="out"):
    """Norms, since the largest of two independent roundings is a matter of luck."""
    if "rope" not in spec:  # the same offsets, so the same bits
        assert torch.equal(moved, found), f"{spec}, {name}: {(moved - found).abs().max()}"
        return
    allowed = 2 * (found.to(F64) - truth).norm()
    # A gradient of a few numbers may have no rounding at all, an output less than usual.
    allowed += (0.1 if name == "out" else 1.0) * torch.finfo(found.dtype).eps * truth.norm()
    change = (moved.to(F64) - found.to(F64)).norm()
    assert change <= allowed, f"{spec}, {name}: {change:.2e}, allowed {allowed:.2e}"


@pytest.mark.cases(11)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", TEXT)
def test_text(spec, dtype):
    """Gaps and cached keys: 4 queries at the end of 24 keys."""
    where = torch.cat((torch.arange(20), torch.arange(23, 27)))
    check(spec, [text(where, where, s) for s in (0, *SHIFTS)], dtype, causal=True)
    check(spec, [text(where[-4:], where, s) for s in (0, *SHIFTS)], dtype, causal=True)


@pytest.mark.cases(17)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", IMAGE)
def test_image(spec, dtype):
    check(spec, [patches(s) for s in (0, *SHIFTS)], dtype)


@pytest.mark.parametrize("spec", [s for s in TEXT if "+" not in s and "span" not in s])
def test_far_text_is_the_oracle(spec):
    """In float64, shifted, against loops over unshifted positions."""
    module = holder(spec, F64, causal=True)
    q, k, v = (x.detach() for x in inputs(3, 6, F64))
    queries, keys = torch.tensor([6, 7, 30]), torch.tensor([0, 1, 2, 6, 7, 30])
    where = [queries.tolist()] * 2, [keys.tolist()] * 2
    logit, value = oracle(spec, next(iter(module.values())), q, k, *where, causal=True)
    wanted = plain.attention(q, k, v, logit, value, is_causal=True)
    for shift in (0, *SHIFTS):
        found = attend(module, q, k, v, text(queries, keys, shift), causal=True)
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("spec", CONTENT)
def test_rotary_with_content_terms(spec):
    where = torch.arange(34)
    geometries = [patches(s) if "axial" in spec else text(where, where, s) for s in (0, 3)]
    check(spec, geometries, torch.float32)


def test_positions_in_a_16_bit_dtype():
    for dtype in (torch.float16, torch.bfloat16):
        where = torch.arange(5).to(dtype)
        for make in (
            lambda w: irpe.Sequence(5, positions=w),
            lambda w: irpe.Sequence(5, keys=w),
            lambda w: irpe.Geometry(torch.stack((w, w), -1)),
            lambda w: irpe.Grid(5, 5, positions=torch.stack((w, w), -1)),
        ):
            with pytest.raises(irpe.IrpeError, match=f"{dtype}"):
                make(where)


def reversed_alibi(module, q, k, v, positions):
    return attend(module, q, k, v, irpe.Sequence(9, positions=positions), causal=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_causal_alibi_of_any_order_is_by_distance(compiled):
    module = holder("alibi", torch.float32, causal=True)
    call = torch.compile(reversed_alibi, backend="aot_eager") if compiled else reversed_alibi
    q, k, v = (x.detach() for x in inputs(9, 9, torch.float32))
    slopes = torch.tensor(plain.slopes(H))[:, None, None]
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    for where in (
        torch.arange(9),
        torch.arange(9).flip(0),
        torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5]),
        torch.arange(9, dtype=torch.uint8).flip(0),
    ):
        far = (where.long()[:, None] - where.long()).abs()
        logits = (q @ k.mT * D**-0.5 - slopes * far).masked_fill(~seen, -math.inf)
        torch.testing.assert_close(call(module, q, k, v, where), logits.softmax(-1) @ v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gap", [0, 1000, 10**6])
def test_causal_alibi_over_a_gap(gap, dtype):
    """Also across samples: the second one starts far away."""
    where = torch.cat((torch.arange(32), torch.arange(32, 64) + gap))
    geometry = irpe.Sequence(64, positions=torch.stack((where, where + 10**7)))
    module, qkv = holder("alibi", dtype, causal=True), inputs(64, 64, dtype)
    exact = attend(module, *(x.double() for x in qkv), geometry, True, "reference")
    rough = attend(module, *qkv, geometry, True, "reference")
    assert_as_good(attend(module, *qkv, geometry, True), rough, exact)


def several(modules, qkv, geometry, causal):
    return [attend(module, *qkv, geometry, causal=causal) for module in modules]


COMPILED = (
    ("inductor", False, ("alibi", "rope")),
    ("aot_eager", False, (TEXT[6], "rope + t5,buckets=8,max=20", *TEXT[9:15])),
    ("aot_eager", True, ("alibi", *IMAGE[-5:], "rpe-1.9-product-ctx-0-qkv", RPE[24])),
)


@pytest.mark.cases(1)
@pytest.mark.parametrize(("backend", "image", "specs"), COMPILED)
def test_compiled(backend, image, specs):
    """One graph of several encodings, which serves every shift."""
    modules = [holder(spec, torch.float32, causal=not image) for spec in specs]
    where = torch.arange(34)
    q, k, v = (x.detach() for x in inputs(34, 34, torch.float32))
    compiled = torch.compile(several, backend=backend, fullgraph=True)

    def call(shift):
        geometry = patches(shift) if image else text(where, where, shift)
        return compiled(modules, (q, k, v), geometry, not image)

    near, geometry = call(0), patches() if image else text(where, where)
    shifted = [call(shift) for shift in SHIFTS]
    for n, spec in enumerate(specs):
        exact = holder(spec, torch.float32, causal=not image).to(F64)
        truth = attend(exact, q.double(), k.double(), v.double(), geometry, not image, "reference")
        torch.testing.assert_close(near[n], truth.float(), rtol=1e-5, atol=1e-5)
        for moved in shifted:
            within(moved[n], near[n], truth, spec)


MODELS = ("alibi", "rope", "t5,buckets=8,max=20", "shaw,clip=5,on=kv", "huang1,clip=5")
MODELS += ("huang3,clip=5", "huang4,clip=5")


def language_model(spec, dtype):
    torch.manual_seed(4)
    model = CausalLM(11, spec, dim=24, depth=2, num_heads=3).eval()
    for name, p in model.named_parameters():
        if any(part in name for part in ("shaw", "huang", "t5")):
            torch.nn.init.normal_(p, float("huang1" in spec or "huang3" in spec), 0.3)
    return model.to(dtype)


TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5]])


@torch.no_grad()
def decoded(model, start):
    """Logits of a prompt of 5 tokens, then token by token."""
    out, state = model(TOKENS[:, :5], positions=torch.arange(start, start + 5), state=Cache())
    outs = [out]
    for n in range(5, 12):
        out, state = model(TOKENS[:, n : n + 1], state=state)
        outs.append(out)
    return torch.cat(outs, 1)


def remembered(model, start):
    """Logits of the second block of 4 tokens; those remembered of the first are moved."""
    _, state = model(TOKENS[:, :4], state=model.memory(4, 3))
    state = dataclasses.replace(state, positions=state.positions + start)
    return model(TOKENS[:, 4:8], state=state)[0].detach()


@pytest.mark.cases(6)
@pytest.mark.parametrize("read", [decoded, remembered])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", MODELS)
def test_language_models(spec, dtype, read):
    truth = read(language_model(spec, dtype).to(F64), 0)
    found = read(language_model(spec, dtype), 0)
    for start in (3, 10**6, 10**7):
        within(read(language_model(spec, dtype), start), found, truth, spec)
