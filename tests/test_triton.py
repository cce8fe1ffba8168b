"""The triton backend against the reference in float64, which the loops have checked.

Without a GPU the kernels run in Triton's interpreter, in float32 and float16.
"""

import pytest
import test_attention as cases
import test_official as official
import torch
from fused import DEVICE, DTYPES, compare, expected, leaf, outcome, tabled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles.precision import assert_as_good

import irpe
from irpe.backends import reference
from irpe.backends.call import Call
from irpe.backends.triton import strips
from irpe.backends.triton.plan import encode, plan_of


def made(spec, D=24, H=2, prefix=1, std=1.0):
    """Terms of a spec with random tables, by geometry."""
    modules = irpe.build_rpe(spec, head_dim=D, num_heads=H, prefix=int(prefix), device=DEVICE)
    for parameter in (p for m in modules if m for p in m.parameters()):
        torch.nn.init.normal_(parameter, std=std)
    return lambda geometry: sum((m.terms(geometry) for m in modules if m), ())


def tensors(B, H, L, S, D, G=None, E=None):
    return [torch.randn(B, h, n, d) for h, n, d in ((H, L, D), (G or H, S, D), (G or H, S, E or D))]


@pytest.mark.cases(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", cases.CASES)
def test_every_case_of_the_loops(name, dtype, launches):
    modules, geometry, qkv, arguments, *_ = cases.solved(name)
    terms = cases.joined(modules, geometry)
    compare(qkv, terms, dtype, **arguments)
    assert launches == expected(terms)


@pytest.mark.cases(1)
@pytest.mark.parametrize("case", official.ATTENTION_CASES)
def test_official_numbers(case, launches):
    mode, method, on = case.split("_")[:3]
    numbers = official.ATTENTION
    ratio, shared, skip, height, width, heads, dim, _ = numbers[f"{case}/meta"]
    spec = irpe.RPE(
        ratio=float(ratio), method=method, mode=official.MODES[mode], shared=bool(shared), on=on
    )
    modules = irpe.build_rpe(spec, head_dim=int(dim), num_heads=int(heads), prefix=int(skip))
    names = [f"rpe_{n}" for n, m in zip("qkv", modules, strict=True) if m is not None]
    owner = torch.nn.ModuleDict(dict(zip(names, [m for m in modules if m], strict=True)))
    prefix = f"{case}/table/"
    tables = {n: official._tensor(n) for n in numbers.files if n.startswith(prefix)}
    owner.load_state_dict({n[len(prefix) :]: x for n, x in tables.items()})
    q, k, v, w = (official._tensor(f"in_skip{int(skip)}/{name}") for name in "qkvw")
    qkv = [leaf(x, torch.float32) for x in (q, k, v)]
    owner = owner.to(DEVICE)
    terms = sum(
        (m.terms(irpe.Grid(int(height), int(width), int(skip))) for m in owner.values()), ()
    )
    found = outcome("triton", qkv, terms, w.to(DEVICE, torch.float32))
    names = [f"grad_table/{n}" for n, _ in owner.named_parameters()]
    for x, name in zip(found, ["out", "grad_q", "grad_k", "grad_v", *names], strict=True):
        stored = torch.from_numpy(numbers[f"{case}/{name}"])
        band = 1e-5 * stored.abs().max()
        torch.testing.assert_close(x.cpu(), stored, rtol=1e-5, atol=float(band))
    assert launches == expected(terms)


@pytest.fixture
def on_strips(monkeypatch):
    """Takes the products for whole grids of any size; list of the calls that took them."""
    calls = []
    real = strips.strips
    irpe.clear_cache()
    monkeypatch.setattr(strips, "WASTE", float("inf"))
    monkeypatch.setattr(strips, "strips", lambda *given: calls.append(given) or real(*given))
    return calls


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    ("spec", "grid"),
    [
        ("rpe-1.9-product-ctx-1-qkv", (5, 6, 1)),  # a unit is more than a column
        ("rpe-1.9-product-ctx-0-qkv", (17, 3, 0)),  # two units a column
        ("rpe-1.9-product-ctx-1-k", (3, 34, 2)),  # three parts, prefix in the last
        ("rpe-1.9-product-bias-0-qk", (6, 18, 17)),  # two runs of prefix tokens
        ("rpe-2.0-product-ctx-1-k", (9, 7, 1)),  # nine column buckets: sixteen numbers a run
        ("rpe-2.0-product-ctx-1-qkv", (18, 2, 1)),
        ("rpe-1.9-cross-ctx-0-qkv", (8, 5, 1)),
        ("rpe-1.9-cross-bias-1-k", (4, 4, 0)),
    ],
)  # fmt: skip
def test_strips(spec, grid, launches, on_strips):
    grid = irpe.Grid(*grid)
    terms = made(spec, 16, prefix=grid.prefix, std=0.5)(grid)
    qkv = tensors(2, 2, grid.query_length, grid.query_length, 16)
    mask = torch.rand(2, 1, 1, grid.query_length) > 0.2
    compare(qkv, terms, DTYPES[-1], mask)
    assert launches == expected(terms) and len(on_strips) == 1


@pytest.mark.parametrize("sides", [(25, 34), (34, 25), (32, 42), (42, 42), (14, 14)])
@pytest.mark.parametrize("spec", ["product-bias-1-k", "product-ctx-1-qkv", "cross-ctx-0-qk"])
def test_grids_of_detection_take_strips(sides, spec):
    terms = made(f"rpe-2.0-{spec}", 16, prefix=0)(irpe.Grid(*sides))
    assert strips.applicable(terms, torch.float16, False)
    assert not strips.applicable(terms, torch.float32, False)


@pytest.mark.slow
@pytest.mark.parametrize("sides", [(25, 34), (34, 25), (32, 42), (42, 42)])
@pytest.mark.parametrize("on", ["bias-1-k", "ctx-1-k", "ctx-1-qk", "ctx-1-qkv"])
def test_detection(sides, on, launches):
    """DETR's encoder: a quarter of the keys are padding."""
    grid = irpe.Grid(*sides)
    seen = torch.ones(sides, dtype=torch.bool)
    seen[:, 3 * sides[1] // 4 :] = False
    terms = made(f"rpe-2.0-product-{on}", D=32, H=1, prefix=0)(grid)
    qkv = tensors(1, 1, grid.query_length, grid.query_length, 32)
    compare(qkv, terms, torch.float16, mask=seen.view(1, 1, 1, -1))
    assert launches == expected(terms)


@pytest.mark.parametrize("number", [float("-inf"), float("nan")])
def test_numbers_on_strips_that_are_not_finite(number, on_strips):
    grid = irpe.Grid(4, 5)
    (term,) = made("rpe-1.9-product-bias-1-k", 16, prefix=0)(grid)
    table = term.table.detach().clone()
    table[:, 25] = number  # of offset (0, 1)
    terms = tabled([term], [table.half()])
    qkv = [x.to(DEVICE, torch.float16) for x in tensors(1, 2, 20, 20, 16)]
    found = irpe.attention(*qkv, terms, backend="triton")
    wanted = irpe.attention(*qkv, terms, backend="reference")
    assert len(on_strips) == 1
    # A row without the bucket may be NaN as well: its numbers come along with others'.
    clean = ~wanted.isnan()
    assert found[~clean].isnan().all()
    if number != number:
        clean &= ~found.isnan()
    torch.testing.assert_close(found[clean], wanted[clean], rtol=2e-3, atol=2e-3)


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", cases.CASES)
def test_every_case_of_the_loops_on_strips(name, launches, on_strips):
    modules, geometry, qkv, arguments, *_ = cases.solved(name)
    terms = cases.joined(modules, geometry)
    if not strips.applicable(terms, torch.float16, arguments.get("is_causal", False)):
        pytest.skip("no whole grid, or no buckets that part into rows and columns")
    compare(qkv, terms, torch.float16, **arguments)
    assert launches == expected(terms) and len(on_strips) == 1


@pytest.mark.cases(1)
@pytest.mark.parametrize("D", [16, 32, 60, 64, 96, 128])
def test_head_dims(D, launches):
    grid = irpe.Grid(7, 9)
    terms = made("rpe-2.0-product-ctx-0-qkv", D, prefix=0, std=0.3)(grid)
    compare(tensors(1, 2, 63, 63, D), terms, torch.float16)
    assert launches == expected(terms)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
def test_more_than_one_tile(dtype):
    """L over several blocks, S not of the same number."""
    query, key = torch.randint(0, 30, (150, 2)), torch.randint(0, 30, (200, 2))
    geometry = irpe.Geometry(query, key, prefix=1, key_prefix=1)
    compare(tensors(1, 2, 151, 201, 16), made("rpe-2.0-product-ctx-1-qkv", 16)(geometry), dtype)


def test_more_than_256_buckets():
    grid = irpe.Grid(9, 9)
    terms = made("rpe-9.0-product-ctx-1-qk", 16, prefix=0)(grid)
    assert terms[0].buckets.size > 256
    compare(tensors(1, 2, 81, 81, 16), terms, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_terms_of_several_functions(dtype):
    """Maps that differ by kind, and two tables of one kind on one map."""
    grid = irpe.Grid(5, 4, prefix=1)
    some = [
        ("product", "bias", "qk"),
        ("euc", "ctx", "k"),
        ("cross", "ctx", "qv"),
        ("euc", "ctx", "k"),
    ]
    terms = sum(
        (made(f"rpe-2.0-{m}-{mode}-{n % 2}-{on}")(grid) for n, (m, mode, on) in enumerate(some)), ()
    )
    qkv = tensors(2, 2, 21, 21, 24)
    device = torch.device(DEVICE)
    code, given = encode(Call(*qkv, terms, None, False, 0.0, 1.0, device))
    assert given is None
    # product, euc, rows, columns: one map for both directions
    assert len(plan_of(tuple(code), device).ids) == 4
    compare(qkv, terms, dtype)


@pytest.mark.cases(1)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits(dtype):
    """In the hundreds, rounding decides between two keys, for plain torch too: by most draws."""
    failed = []
    for seed in range(5):
        torch.manual_seed(seed)
        q, k, v = tensors(1, 2, 36, 36, 24)
        terms = made("rpe-1.9-product-ctx-0-qkv", std=3.0)(irpe.Grid(7, 5, 1))
        try:
            compare((q * 30, k, v), terms, dtype)
        except AssertionError as error:
            failed.append(str(error))
    assert len(failed) <= 2, failed


@pytest.mark.cases(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["all equal", "one key", "negative"])
def test_adversarial_values(case, dtype):
    q, k, v = tensors(1, 2, 36, 36, 24)
    std, mask = 1.0, None
    if case == "all equal":
        q, std = q * 0, 0.0
    if case == "one key":
        mask = torch.full((36, 36), -torch.inf)
        mask[torch.arange(36), torch.randint(36, (36,))] = 0.0
    if case == "negative":
        mask = torch.full((36, 36), -3e4)
    compare((q, k, v), made("rpe-1.9-product-ctx-0-qkv", std=std)(irpe.Grid(7, 5, 1)), dtype, mask)


@pytest.mark.cases(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["dead", "dead additive", "causal"])
def test_rows_that_see_nothing(mask, dtype):
    """Output exactly 0 and zero gradients there, finite everywhere."""
    geometry, queries, keys = cases.WHERE["L>S" if mask == "causal" else "3x4+1"]()
    terms = made("rpe-2.0-product-ctx-0-qkv", 6)(geometry)
    L, S = len(queries[0]), len(keys[0])
    options, dead = {"is_causal": True}, [0]
    if mask != "causal":
        options, dead = {"mask": cases.make_mask(mask, 2, 2, L, S).to(DEVICE)}, [2]
    inputs = [leaf(x, dtype) for x in (*tensors(2, 2, L, S, 6), *(t.table for t in terms))]
    weight = torch.randn(2, 2, L, 6, dtype=dtype, device=DEVICE)
    found = outcome("triton", inputs[:3], tabled(terms, inputs[3:]), weight, **options)
    assert (found[0][:, :, dead] == 0).all() and (found[1][:, :, dead] == 0).all()
    assert all(torch.isfinite(x).all() and x.abs().max() > 0 for x in found)


def test_nothing_seen_at_all():
    terms = made("rpe-2.0-product-ctx-1-qkv", 6)(irpe.Grid(3, 4, prefix=1))
    qkv = [leaf(x) for x in tensors(2, 2, 13, 13, 6)]
    for mask in (torch.zeros(13, 13, dtype=torch.bool), torch.full((13, 13), -torch.inf)):
        found = outcome("triton", qkv, terms, torch.ones_like(qkv[0]), mask=mask.to(DEVICE))
        assert all((x == 0).all() for x in found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_of_the_lowest_number(dtype):
    terms = made("rpe-2.0-product-ctx-1-k", 6)(irpe.Grid(3, 4, prefix=1))
    inputs = [leaf(x, dtype) for x in (*tensors(2, 2, 13, 13, 6), *(t.table for t in terms))]
    mask = torch.zeros(2, 1, 13, 13, device=DEVICE)
    mask[0] = torch.finfo(torch.float32).min
    mask[1, ..., 4:] = torch.finfo(torch.float32).min
    terms = tabled(terms, inputs[3:])
    out = irpe.attention(*inputs[:3], terms, mask=mask, backend="triton")
    assert torch.isfinite(out).all()
    seen = irpe.attention(*inputs[:3], terms, mask=mask == 0, backend="triton")
    torch.testing.assert_close(out[1], seen[1])


@pytest.mark.cases(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.4, 1.0])
def test_dropout(p, dtype):
    """The mask it draws is found out by values of one, and given to the reference."""
    B, H, L = 2, 2, 21
    terms = made("rpe-2.0-product-ctx-0-qkv")(irpe.Grid(5, 4, prefix=1))
    inputs = [leaf(x, dtype) for x in (*tensors(B, H, L, L, 24), *(t.table for t in terms))]
    weight = torch.randn(B, H, L, 24, dtype=dtype, device=DEVICE)
    eye = torch.eye(L, dtype=dtype, device=DEVICE).expand(B, H, L, L)
    torch.manual_seed(5)
    held = tabled(terms, inputs[3:])
    kept = irpe.attention(*inputs[:2], eye, held[:2], dropout_p=p, backend="triton")
    torch.manual_seed(5)
    found = outcome("triton", inputs[:3], held, weight, dropout_p=p)
    keep = (kept > 0).double() / (1 - p if p < 1 else 1)
    if p < 1:
        assert 0.3 < (kept == 0).double().mean() < 0.5
        assert not torch.equal(kept[0] == 0, kept[1] == 0)
        assert not torch.equal(kept[0, 0] == 0, kept[0, 1] == 0)
    for_plain, for_truth = ([leaf(x, d) for x in inputs] for d in (dtype, torch.float64))
    results = []
    for copies in (for_plain, for_truth):
        kind = copies[0].dtype
        call = Call(
            *copies[:3], tabled(terms, copies[3:]), None, False, 0.0, 24**-0.5, copies[0].device
        )
        out = reference.attention(call, keep.to(kind))
        grads = torch.autograd.grad((out * weight.to(kind)).sum(), copies)
        results.append([out, *grads])
    for n, (x, plainly, truth) in enumerate(zip(found, *results, strict=True)):
        assert_as_good(x, plainly, truth, n)


def test_dropout_seeds():
    terms = made("rpe-2.0-product-ctx-1-v", 8)(irpe.Grid(3, 4, prefix=1))
    qkv = [leaf(x) for x in tensors(1, 2, 13, 13, 8)]
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(irpe.attention(*qkv, terms, dropout_p=0.3, backend="triton"))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_strided_inputs_are_not_copied(monkeypatch):
    """q, k and v as views of one projection; a gradient without strides of its own."""
    terms = made("rpe-2.0-product-ctx-0-qkv", 16)(irpe.Grid(3, 4, prefix=1))
    x = torch.randn(2, 13, 3, 2, 16, device=DEVICE, requires_grad=True)
    q, k, v = x.permute(2, 0, 3, 1, 4).unbind(0)
    before = x.detach().clone()
    copies = []
    contiguous = torch.Tensor.contiguous
    monkeypatch.setattr(
        torch.Tensor, "contiguous", lambda t: copies.append(t.is_contiguous()) or contiguous(t)
    )
    out = irpe.attention(q, k, v, terms, backend="triton")
    assert all(copies), "something was copied"
    assert out.transpose(1, 2).is_contiguous()
    (grad,) = torch.autograd.grad(out.sum(), x)
    others = [leaf(y) for y in (q, k, v)]
    other = irpe.attention(*others, terms, backend="reference")
    wanted = torch.stack(torch.autograd.grad(other.sum(), others)).permute(1, 3, 0, 2, 4)
    torch.testing.assert_close(out, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(x, before)


def test_transposed_last_axis():
    """A last axis with a stride is copied instead of being misread."""
    terms = made("rpe-2.0-product-ctx-0-qkv", 16)(irpe.Grid(3, 4, prefix=1))
    qkv = [x.mT.contiguous().mT.to(DEVICE) for x in tensors(2, 2, 13, 13, 16)]
    out = irpe.attention(*qkv, terms, backend="triton")
    wanted = irpe.attention(*qkv, terms, backend="reference")
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)


def test_frozen_parts(launches):
    """Frozen tables cost no gradient and do not change the others."""
    terms = made("rpe-1.9-product-ctx-1-qkv", 8, prefix=0)(irpe.Grid(2, 3))
    q, k, v = (leaf(x) for x in tensors(1, 2, 6, 6, 8))
    wanted = torch.autograd.grad(irpe.attention(q, k, v, terms, backend="triton").sum(), q)[0]
    frozen = tuple(t.with_table(t.table.detach()) for t in terms)
    out = irpe.attention(q, k.detach(), v.detach(), frozen, backend="triton")
    torch.testing.assert_close(torch.autograd.grad(out.sum(), q)[0], wanted)


def test_one_tensor_as_query_key_and_value():
    terms = made("rpe-1.9-product-ctx-1-k", 8, prefix=0)(irpe.Grid(2, 3))
    x = torch.randn(1, 2, 6, 8, device=DEVICE, requires_grad=True)
    found, wanted = (
        torch.autograd.grad(irpe.attention(x, x, x, terms, backend=b).square().sum(), x)[0]
        for b in ("triton", "reference")
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_empty_batch():
    terms = made("rpe-1.9-product-ctx-1-qkv", 8, prefix=0)(irpe.Grid(2, 3))
    q, k, v = (leaf(x) for x in tensors(0, 2, 6, 6, 8))
    out = irpe.attention(q, k, v, terms, backend="triton")
    out.sum().backward()
    assert out.shape == (0, 2, 6, 8) and q.grad.shape == q.shape


@pytest.mark.cases(1)
@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic(dtype):
    """The other way to add up gradients of tables is as exact, and twice the same."""
    terms = made("rpe-2.0-product-ctx-0-qkv")(irpe.Grid(5, 4, prefix=1))
    inputs = [leaf(x, dtype) for x in (*tensors(2, 2, 21, 21, 24), *(t.table for t in terms))]
    weight = torch.randn(2, 2, 21, 24, dtype=dtype, device=DEVICE)
    torch.use_deterministic_algorithms(True)
    try:
        compare(inputs[:3], tabled(terms, inputs[3:]), dtype)
        once, twice = (
            outcome("triton", inputs[:3], tabled(terms, inputs[3:]), weight) for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_double_backward_names_the_reference():
    terms = made("rpe-1.9-product-ctx-1-k", 8, prefix=0)(irpe.Grid(2, 3))
    q, k, v = (leaf(x) for x in tensors(1, 2, 6, 6, 8))
    out = irpe.attention(q, k, v, terms, backend="triton")
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(irpe.IrpeError, match="second derivative.*reference"):
        grad.sum().backward()


@pytest.mark.full
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_calls(data):
    draw = data.draw
    method = draw(st.sampled_from(["product", "cross", "euc", "quant", "rank"]))
    mode = draw(st.sampled_from(["ctx", "bias"]))
    on = draw(st.sampled_from(["q", "k", "qk"] + (["v", "qkv"] if mode == "ctx" else [])))
    ratio = draw(st.sampled_from([1.0, 1.9, 3.0]))
    H, G = draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]))
    grid = irpe.Grid(
        draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.sampled_from([0, 1, 5]))
    )
    D, E, B = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(1, 3))
    spec = f"rpe-{ratio}-{method}-{mode}-{draw(st.integers(0, 1))}-{on}"
    if "v" in on:
        E = D
    L = grid.query_length
    torch.manual_seed(draw(st.integers(0, 99)))
    mask = draw(st.sampled_from([None, "bool", "additive", "padding"]))
    if mask == "padding" and B < 2:
        mask = None
    mask = None if mask is None else cases.make_mask(mask, B, H, L, L)
    terms = made(spec, D, H, grid.prefix)(grid)
    compare(
        tensors(B, H, L, L, D, G, E), terms, draw(st.sampled_from(DTYPES)), mask=mask,
        is_causal=draw(st.booleans()), scale=draw(st.sampled_from([None, 0.3, 0.0])),
    )  # fmt: skip


def operator_calls():
    """(operator, arguments) for opcheck, of each way to use it."""
    from irpe.backends.triton import ops

    kept = []
    names = ("fused_attention", "fused_attention_backward")
    for spec, options in (
        ("rpe-1.9-product-ctx-0-qkv", {}),
        ("rpe-1.9-cross-bias-1-k", {"is_causal": True}),
        ("rpe-1.9-product-ctx-1-qk", {"mask": torch.rand(7, 7) > 0.3, "dropout_p": 0.2}),
    ):
        terms = made(spec, 8)(irpe.Grid(2, 3, prefix=1))
        with pytest.MonkeyPatch.context() as patch:
            for name in names:
                real = getattr(ops, name)
                patch.setattr(
                    ops, name, lambda *args, real=real: kept.append((real, args)) or real(*args)
                )
            qkv = [leaf(x) for x in tensors(1, 2, 7, 7, 8)]
            options = {k: v.to(DEVICE) if k == "mask" else v for k, v in options.items()}
            irpe.attention(*qkv, terms, backend="triton", **options).sum().backward()
    return kept


def test_opcheck():
    calls = operator_calls()
    assert len(calls) == 6
    for operator, args in calls:
        args = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args)
        torch.library.opcheck(operator, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    """fullgraph, the operators being opaque to the compiler, with gradients."""
    layer = irpe.RPEAttention(32, 2, "rpe-1.9-product-ctx-1-qkv", backend="triton", prefix=1).to(
        DEVICE
    )
    for _name, p in layer.named_parameters():
        torch.nn.init.normal_(p, std=0.3)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for height in (3, 4):
        grid = irpe.Grid(height, 4, prefix=1)
        x = torch.randn(2, 4 * height + 1, 32, device=DEVICE)
        results = []
        for run in (layer, compiled):
            layer.zero_grad()
            out = run(x, grid)
            out.square().sum().backward()
            results.append([out.detach(), *(p.grad.clone() for p in layer.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_exports_as_plain_operations():
    layer = irpe.RPEAttention(32, 2, "rpe-1.9-product-ctx-1-k", prefix=1).to(DEVICE)
    x, grid = torch.randn(2, 13, 32, device=DEVICE), irpe.Grid(3, 4, prefix=1)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x, grid)

    program = torch.export.export(Model(), (x,))
    assert "irpe" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), layer(x, grid), rtol=1e-4, atol=1e-5)


def test_autocast(launches):
    device = torch.device(DEVICE).type
    dtype = torch.float16
    layer = irpe.RPEAttention(32, 2, "rpe-1.9-product-ctx-1-qkv", backend="triton", prefix=1).to(
        DEVICE
    )
    for p in (layer.rpe_q.table, layer.rpe_k.table, layer.rpe_v.table):
        torch.nn.init.normal_(p, std=0.3)
    x, grid = torch.randn(2, 13, 32, device=DEVICE), irpe.Grid(3, 4, prefix=1)
    plain = layer(x, grid)
    with torch.autocast(device, dtype):
        out = layer(x, grid)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), plain, rtol=2e-2, atol=2e-2)
    out.sum().backward()
    assert layer.rpe_k.table.grad.dtype == torch.float32
    assert launches == ["prepare", "project", "forward"] * 2 + ["row_pass", "column_pass", "reduce"]


@pytest.mark.full
def test_grids_of_one_column(monkeypatch):
    """Strips with empty slots, whose sums are garbage and must not reach gradients of tables."""
    monkeypatch.setattr(strips, "WASTE", float("inf"))
    torch.manual_seed(0)
    modules = irpe.build_rpe("rpe-1.0-product-ctx-1-qkv", head_dim=128, num_heads=1, prefix=0)
    for module in modules:
        torch.nn.init.normal_(module.lookup_table_weight)
    terms = sum((m.to(DEVICE).terms(irpe.Grid(21, 1)) for m in modules), ())
    compare([torch.randn(1, 1, 21, 128) for _ in range(3)], terms, torch.float16)
