"""irpe.attention against loops in float64: outputs and every gradient, on every backend."""

import functools

import pytest
import torch
from common import TILES
from oracles import attention as truth
from oracles import buckets as plain
from oracles.precision import assert_as_good

import irpe

BACKENDS = ("reference", "eager", *TILES, "sdpa", "auto")
F64 = torch.float64


def build(spec, D, H, prefix, axes=2):
    """Modules of a spec with random tables; and the same as the oracle's encodings."""
    spec = irpe.parse(spec)
    given = {"dim": D * H, "num_heads": H, "prefix": int(prefix), "axes": axes, "dtype": F64}
    modules = {name.removeprefix("rpe_"): m for name, m in irpe.build(spec, **given).items()}
    encodings = []
    for on, module in modules.items():
        # On a cross module this is rows, then columns, as the functions are.
        for table, function in zip(module.parameters(), plain.buckets(spec, axes), strict=True):
            torch.nn.init.normal_(table)
            encodings.append((f"bias_{on}" if spec.mode == "bias" else on, table, function))
    return list(modules.values()), encodings


def joined(modules, geometry):
    return sum((m.terms(geometry) for m in modules), ())


def tensors(B, H, L, S, D, G=None, Dv=None):
    q = torch.randn(B, H, L, D, dtype=F64, requires_grad=True)
    k = torch.randn(B, G or H, S, D, dtype=F64, requires_grad=True)
    v = torch.randn(B, G or H, S, Dv or D, dtype=F64, requires_grad=True)
    return q, k, v


def _dropped(height, width, keep, prefix=0):
    indices = torch.stack([torch.randperm(height * width)[:keep].sort()[0] for _ in range(2)])
    where = [[None] * prefix + [(int(i) // width, int(i) % width) for i in row] for row in indices]
    return irpe.Grid(height, width, prefix).select(indices), where, where


def _whole(height, width, prefix=0):
    where = [plain.grid(height, width, prefix)] * 2
    return irpe.Grid(height, width, prefix=prefix), where, where


def _positions(per_sample, prefix=0):
    rows = torch.tensor([[[0, 0], [5, 2], [2, 9]], [[1, 1], [0, 3], [7, 0]]])
    rows = rows if per_sample else rows[:1]
    where = [[None] * prefix + [tuple(p) for p in sample.tolist()] for sample in rows]
    where = where if per_sample else where * 2
    return irpe.Grid(8, 10, prefix, positions=rows), where, where


def _unequal(per_sample_keys=False, prefix=2, key_prefix=1):
    query = torch.tensor([[0, 0], [3, 1], [1, 4]])
    key = torch.tensor(
        [[[0, 0], [0, 1], [1, 0], [2, 5], [6, 6]], [[4, 4], [3, 3], [1, 0], [0, 7], [2, 2]]]
    )
    if not per_sample_keys:
        key = key[0]
    geometry = irpe.Geometry(query, key, prefix=prefix, key_prefix=key_prefix)
    samples = key if per_sample_keys else [key, key]
    queries = [[None] * prefix + [tuple(p) for p in query.tolist()]] * 2
    keys = [[None] * key_prefix + [tuple(p) for p in sample.tolist()] for sample in samples]
    return geometry, queries, keys


WHERE = {
    "7x5": lambda: _whole(7, 5),
    "1x6+1": lambda: _whole(1, 6, 1),
    "6x1": lambda: _whole(6, 1),
    "3x4+5": lambda: _whole(3, 4, 5),
    "3x4+1": lambda: _whole(3, 4, 1),
    "3x4": lambda: _whole(3, 4),
    "dropped": lambda: _dropped(4, 5, 7, 1),
    "positions": lambda: _positions(True),
    "positions one for all": lambda: _positions(False, 1),
    "L!=S": lambda: _unequal(),
    "L!=S no key prefix": lambda: _unequal(prefix=1, key_prefix=0),
    "L!=S no query prefix": lambda: _unequal(prefix=0, key_prefix=2),
    "L!=S no prefix": lambda: _unequal(prefix=0, key_prefix=0),
    "L!=S keys per sample": lambda: _unequal(True),
}
# what: (spec, where, options); options: D, Dv, H, G, scale, mask, causal
CASES = {
    "product k": ("rpe-1.9-product-ctx-1-k", "7x5", {"D": 12, "H": 1}),
    "product q": ("rpe-2.0-product-ctx-1-q", "3x4+1", {"H": 1}),
    "product v": ("rpe-2.0-product-ctx-0-v", "3x4", {"H": 1}),
    "all, prefix 5": ("rpe-2.0-product-ctx-1-qkv", "3x4+5", {"D": 12}),
    "all per head": ("rpe-1.5-product-ctx-0-qkv", "3x4+1", {}),
    "euc all": ("rpe-3.0-euc-ctx-0-qkv", "3x4+1", {}),
    "quant qk": ("rpe-5.0-quant-ctx-1-qk", "3x4", {}),
    "rank k": ("rpe-5.0-rank-ctx-1-k", "3x4", {}),
    "cross all": ("rpe-1.9-cross-ctx-0-qkv", "3x4+1", {}),
    "cross bias qk": ("rpe-1.9-cross-bias-0-qk", "3x4+1", {}),
    "product bias qk": ("rpe-1.0-product-bias-1-qk", "3x4+1", {}),
    "product bias k": ("rpe-1.9-product-bias-0-k", "dropped", {}),
    "clip": ("rpe-2.0-product-ctx-1-qkv,index=clip,beta=2", "3x4+1", {}),
    "one row": ("rpe-2.0-product-ctx-1-qkv", "1x6+1", {}),
    "one column": ("rpe-2.0-product-ctx-0-qkv", "6x1", {}),
    "dropped patches": ("rpe-2.0-product-ctx-0-qkv", "dropped", {}),
    "given positions": ("rpe-2.0-cross-ctx-1-qkv", "positions", {}),
    "given positions bias": ("rpe-2.0-product-bias-0-qk", "positions", {}),
    "one set of positions": ("rpe-2.0-product-ctx-1-qkv", "positions one for all", {}),
    "cross-attention": ("rpe-2.0-product-ctx-0-qkv", "L!=S", {}),
    "cross-attention bias": ("rpe-2.0-cross-bias-0-qk", "L!=S", {}),
    "no key prefix": ("rpe-2.0-product-ctx-0-qkv", "L!=S no key prefix", {}),
    "no query prefix": ("rpe-2.0-product-ctx-0-qkv", "L!=S no query prefix", {}),
    "no prefix": ("rpe-2.0-product-ctx-0-qkv", "L!=S no prefix", {}),
    "keys per sample": ("rpe-2.0-product-ctx-0-qkv", "L!=S keys per sample", {}),
    "grouped": ("rpe-2.0-product-ctx-0-qkv", "3x4+1", {"H": 4, "G": 2}),
    "one key head": ("rpe-2.0-product-ctx-1-qk", "3x4", {"H": 3, "G": 1}),
    "scale": ("rpe-2.0-product-ctx-1-qkv", "3x4", {"scale": 0.7}),
    "value width": ("rpe-2.0-product-ctx-1-qk", "3x4", {"Dv": 3}),
    "bool mask": ("rpe-2.0-product-ctx-1-qkv", "3x4+1", {"mask": "bool"}),
    "bool mask k": ("rpe-2.0-product-ctx-1-k", "3x4+1", {"mask": "bool"}),
    "additive mask": ("rpe-2.0-product-ctx-1-qkv", "3x4+1", {"mask": "additive"}),
    "additive mask qk": ("rpe-2.0-product-ctx-1-qk", "3x4+1", {"mask": "additive"}),
    "key padding": ("rpe-2.0-product-ctx-0-qk", "3x4", {"mask": "padding"}),
    "dead rows": ("rpe-2.0-product-ctx-1-qkv", "3x4+1", {"mask": "dead"}),
    "dead rows k": ("rpe-2.0-product-bias-1-k", "3x4+1", {"mask": "dead"}),
    "dead additive": ("rpe-2.0-product-ctx-0-qk", "3x4", {"mask": "dead additive"}),
    "dead sample": ("rpe-2.0-product-ctx-0-qkv", "3x4", {"mask": "dead sample"}),
    "causal": ("rpe-2.0-product-ctx-1-qkv", "3x4+1", {"causal": True}),
    "causal L!=S": ("rpe-2.0-product-ctx-0-qkv", "L!=S", {"causal": True}),
    "causal L>S": ("rpe-2.0-product-ctx-0-qk", "L>S", {"causal": True}),
    "causal and mask": ("rpe-2.0-product-ctx-1-qkv", "3x4+1", {"causal": True, "mask": "bool"}),
    "causal, additive": ("rpe-2.0-product-ctx-1-qk", "3x4+1", {"causal": True, "mask": "additive"}),
}
WHERE["L>S"] = lambda: _swapped(_unequal())


def _swapped(made):
    geometry, queries, keys = made
    other = irpe.Geometry(
        geometry.positions(torch.device("cpu"))[1],
        geometry.positions(torch.device("cpu"))[0],
        prefix=geometry.key_prefix,
        key_prefix=geometry.prefix,
    )
    return other, keys, queries


def make_mask(kind, B, H, L, S):
    if kind is None:
        return None
    if kind == "padding":
        mask = torch.ones(B, 1, 1, S, dtype=torch.bool)
        mask[-1, ..., S // 2 :] = False
        return mask
    if kind == "dead sample":
        mask = torch.ones(B, 1, 1, S, dtype=torch.bool)
        mask[0] = False
        return mask
    mask = torch.rand(L, S) > 0.4 if kind == "bool" else torch.rand(B, H, L, S) > 0.4
    mask[..., range(min(L, S)), range(min(L, S))] = True
    if "dead" in kind:
        mask[..., 2, :] = False
    if "additive" in kind:
        return torch.randn(mask.shape, dtype=F64).masked_fill(~mask, float("-inf"))
    return mask


@functools.cache
def solved(name):
    """A case: its call, and what the loops say."""
    torch.manual_seed(len(name))
    spec, where, options = CASES[name]
    H, D = options.get("H", 2), options.get("D", 6)
    geometry, queries, keys = WHERE[where]()
    L, S = len(queries[0]), len(keys[0])
    prefix = max(geometry.prefix, geometry.key_prefix)
    modules, encodings = build(spec, D, H, prefix)
    q, k, v = tensors(2, H, L, S, D, options.get("G"), options.get("Dv"))
    mask = make_mask(options.get("mask"), 2, H, L, S)
    causal, scale = options.get("causal", False), options.get("scale")
    full = None if mask is None else mask.expand(2, H, L, S)
    out = truth.attention(q, k, v, encodings, queries, keys, full, causal, scale)
    w = torch.randn_like(out)
    tables = [table for _, table, _ in encodings]
    grads = torch.autograd.grad((out * w).sum(), [q, k, v, *tables])
    arguments = {"mask": mask, "is_causal": causal, "scale": scale}
    return modules, geometry, (q, k, v), arguments, tables, w, out.detach(), grads


@pytest.mark.cases(24)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_against_loops(name, backend):
    modules, geometry, qkv, arguments, tables, w, truth_out, truth_grads = solved(name)
    terms = joined(modules, geometry)
    if backend == "sdpa" and any(t.kind == "value" for t in terms):
        with pytest.raises(irpe.IrpeError, match="sdpa.*value.*reference"):
            irpe.attention(*qkv, terms, **arguments, backend=backend)
        return
    out = irpe.attention(*qkv, terms, **arguments, backend=backend)
    torch.testing.assert_close(out, truth_out, rtol=1e-10, atol=1e-10)
    grads = torch.autograd.grad((out * w).sum(), [*qkv, *tables])
    for found, wanted in zip(grads, truth_grads, strict=True):
        assert wanted.abs().max() > 1e-6
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_terms_is_plain_attention(backend):
    q, k, v = tensors(2, 4, 5, 7, 6, G=2)
    where = [[None] * 7] * 2
    wanted = truth.attention(q, k, v, [], where, where, is_causal=True)
    out = irpe.attention(q, k, v, is_causal=True, backend=backend)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", ["dead", "dead additive", "causal"])
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_rows_that_see_nothing(mask, backend):
    """Output exactly 0, gradients exactly 0 and finite everywhere."""
    modules, _ = build("rpe-2.0-product-ctx-1-qk", 6, 2, True)
    geometry, queries, keys = WHERE["L>S" if mask == "causal" else "3x4+1"]()
    q, k, v = tensors(2, 2, len(queries[0]), len(keys[0]), 6)
    given = {"is_causal": True}
    dead = [0]
    if mask != "causal":
        given = {"mask": make_mask(mask, 2, 2, q.shape[2], k.shape[2])}
        dead = [2]
    with torch.autograd.detect_anomaly(check_nan=True):  # nor NaN on the way, hidden by a mask
        out = irpe.attention(q, k, v, joined(modules, geometry), **given, backend=backend)
        out.square().sum().backward()
    assert (out[:, :, dead] == 0).all() and (out[:, :, 3:] != 0).any()
    assert (q.grad[:, :, dead] == 0).all()
    for x in (q, k, v, *(p for m in modules for p in m.parameters())):
        assert torch.isfinite(x.grad).all() and x.grad.abs().max() > 0


@pytest.mark.parametrize("backend", ("reference", "eager", *TILES, "sdpa"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_masks_of_the_lowest_number(dtype, backend):
    """Many models mask with finfo.min in float32, which a lower dtype rounds to -inf."""
    modules, _ = build("rpe-2.0-product-ctx-1-k", 6, 2, True)
    terms = joined([m.to(dtype) for m in modules], irpe.Grid(3, 4, prefix=1))
    q, k, v = (x.detach().to(dtype) for x in tensors(2, 2, 13, 13, 6))
    mask = torch.zeros(2, 1, 13, 13)
    mask[0] = torch.finfo(torch.float32).min
    mask[1, ..., 4:] = torch.finfo(torch.float32).min
    out = irpe.attention(q, k, v, terms, mask=mask, backend=backend)
    assert torch.isfinite(out).all()
    seen = irpe.attention(q, k, v, terms, mask=mask == 0, backend=backend)
    torch.testing.assert_close(out[1], seen[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_projections(backend):
    """q, k and v as views of one qkv projection, and the gradient that comes back to it."""
    modules, _ = build("rpe-2.0-product-ctx-0-qk", 6, 2, True)
    terms = joined(modules, irpe.Grid(3, 4, prefix=1))
    x = torch.randn(2, 13, 3, 2, 6, dtype=F64, requires_grad=True)
    q, k, v = x.permute(2, 0, 3, 1, 4).unbind(0)
    before = x.detach().clone()
    out = irpe.attention(q, k, v, terms, backend=backend)
    w = torch.randn_like(out)
    (grad,) = torch.autograd.grad((out * w).sum(), x)
    copies = [y.detach().clone().contiguous().requires_grad_() for y in (q, k, v)]
    other = irpe.attention(*copies, terms, backend="reference")
    wanted = torch.stack(torch.autograd.grad((other * w).sum(), copies)).permute(1, 3, 0, 2, 4)
    torch.testing.assert_close(out, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, wanted, rtol=1e-11, atol=1e-11)
    assert torch.equal(x, before), "inputs are not written to"


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_and_mask_are_not_written_to(backend):
    modules, _ = build("rpe-2.0-product-ctx-0-qk", 6, 2, True)
    terms = joined(modules, irpe.Grid(3, 4, prefix=1))
    held = [x.detach() for x in tensors(2, 2, 13, 13, 6)]
    mask = make_mask("dead additive", 2, 2, 13, 13)
    everything = [*held, mask, *(p.detach() for m in modules for p in m.parameters())]
    copies = [x.clone() for x in everything]
    first = irpe.attention(*held, terms, mask=mask, backend=backend)
    again = irpe.attention(*held, terms, mask=mask, backend=backend)
    assert torch.equal(first, again)
    assert all(torch.equal(x, y) for x, y in zip(everything, copies, strict=True))


@pytest.mark.parametrize("backend", ("reference", "eager", *TILES))
def test_dropout_of_everything(backend):
    """Dropout acts on the probabilities before the value term."""
    modules, _ = build("rpe-2.0-product-ctx-0-qkv", 6, 2, True)
    q, k, v = tensors(2, 2, 13, 13, 6)
    terms = joined(modules, irpe.Grid(3, 4, prefix=1))
    out = irpe.attention(q, k, v, terms, dropout_p=1.0, backend=backend)
    assert (out == 0).all()
    out.sum().backward()
    for x in (q, k, v, *(p for m in modules for p in m.parameters())):
        assert (x.grad == 0).all()


@pytest.mark.parametrize("backend", ("reference", "eager", *TILES))
def test_dropout_drops_content_and_value_term_together(backend):
    """With v = 1 and a value table of 1, both halves see the same sum of kept probabilities."""
    D, H = 6, 2
    rpe_v = irpe.build_rpe("rpe-2.0-product-ctx-1-v", head_dim=D, num_heads=H, prefix=1, dtype=F64)[
        2
    ]
    with torch.no_grad():
        rpe_v.table[..., : D // 2] = 1.0
    q, k, _ = tensors(2, H, 13, 13, D)
    v = torch.zeros(2, H, 13, D, dtype=F64)
    v[..., D // 2 :] = 1.0
    terms = rpe_v.terms(irpe.Grid(3, 4, prefix=1))
    out = irpe.attention(q, k, v, terms, dropout_p=0.5, backend=backend)
    assert out.std() > 0.01
    torch.testing.assert_close(out[..., : D // 2], out[..., D // 2 :], rtol=1e-12, atol=1e-12)


@pytest.mark.cases(1)
@pytest.mark.parametrize("backend", ("reference", "eager", *TILES, "sdpa"))
def test_dropout_expectation(backend):
    spec = "rpe-2.0-product-ctx-1-qk" if backend == "sdpa" else "rpe-2.0-product-ctx-1-qkv"
    modules, _ = build(spec, 6, 2, False)
    terms = joined(modules, irpe.Grid(2, 3))
    one = [x.detach() for x in tensors(1, 2, 6, 6, 6)]
    many = [x.expand(4000, -1, -1, -1) for x in one]
    wanted = irpe.attention(*one, terms, backend="reference")[0]
    out = irpe.attention(*many, terms, dropout_p=0.3, backend=backend)
    assert not torch.equal(out[0], out[1])
    spread = out.std(0) / 4000**0.5
    assert ((out.mean(0) - wanted).abs() < 5 * spread + 1e-9).all()


@pytest.mark.parametrize("backend", ("reference", "eager", *TILES, "sdpa"))
def test_dropout_gradients_under_a_fixed_seed(backend):
    spec = "rpe-1.0-product-ctx-0-qk" if backend == "sdpa" else "rpe-1.0-product-ctx-0-qkv"
    modules, _ = build(spec, 4, 2, True)
    grid = irpe.Grid(1, 3, prefix=1)
    inputs = [*tensors(1, 2, 4, 4, 4), *(p for m in modules for p in m.parameters())]

    def run(*_):
        torch.manual_seed(3)
        return irpe.attention(*inputs[:3], joined(modules, grid), dropout_p=0.4, backend=backend)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", ("eager", *TILES))
@pytest.mark.parametrize("dropout_p", [0.4, 1.0])
def test_second_derivative_of_dropout(dropout_p, backend):
    """Through eager: the mask drawn in the first pass is the one that is differentiated."""
    modules, _ = build("rpe-1.0-product-ctx-1-qkv", 4, 1, False)
    inputs = [*tensors(1, 1, 3, 3, 4), *(p for m in modules for p in m.parameters())]

    def run(*_):
        torch.manual_seed(3)
        terms = joined(modules, irpe.Grid(1, 3))
        return irpe.attention(*inputs[:3], terms, dropout_p=dropout_p, backend=backend)

    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.cases(7)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("backend", ("reference", "eager", *TILES))
@pytest.mark.parametrize(
    "spec", ["rpe-1.0-product-ctx-0-qkv", "rpe-1.0-product-ctx-1-qkv", "rpe-1.0-cross-bias-0-qk"]
)
def test_gradcheck(spec, backend, order):
    modules, _ = build(spec, 3, 2, True)
    inputs = [*tensors(1, 2, 5, 5, 3, G=1), *(p for m in modules for p in m.parameters())]
    grid = irpe.Grid(2, 2, prefix=1)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    mask[2] = False

    def run(*_):
        terms = joined(modules, grid)
        return irpe.attention(*inputs[:3], terms, mask=mask, backend=backend)

    check = torch.autograd.gradcheck if order == 1 else torch.autograd.gradgradcheck
    assert check(run, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("create_graph", [False, True])
def test_one_tensor_as_query_key_and_value(create_graph, backend):
    """Gradients of x through attention(x, x, x), also while the backward pass is recorded."""
    modules, encodings = build("rpe-1.9-product-ctx-1-k", 6, 2, False)
    terms = joined(modules, irpe.Grid(2, 3))
    x = torch.randn(1, 2, 6, 6, dtype=F64, requires_grad=True)
    where = [plain.grid(2, 3)]
    wanted = torch.autograd.grad(
        truth.attention(x, x, x, encodings, where, where).square().sum(), x
    )
    out = irpe.attention(x, x, x, terms, backend=backend)
    found = torch.autograd.grad(out.square().sum(), x, create_graph=create_graph)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ("reference", "eager", *TILES))
@pytest.mark.parametrize("create_graph", [False, True])
def test_one_table_in_two_terms(create_graph, backend):
    """A tied table gets the sum of both gradients once, not twice."""
    (rpe_k,), encodings = build("rpe-1.9-product-ctx-1-k", 6, 2, False)
    q, k, v = tensors(1, 2, 6, 6, 6)
    where = [plain.grid(2, 3)]
    twice = encodings * 2
    wanted = torch.autograd.grad(
        truth.attention(q, k, v, twice, where, where).square().sum(), rpe_k.table
    )
    terms = rpe_k.terms(irpe.Grid(2, 3))
    out = irpe.attention(q, k, v, terms + terms, backend=backend)
    found = torch.autograd.grad(out.square().sum(), rpe_k.table, create_graph=create_graph)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ("reference", "eager", *TILES, "sdpa"))
def test_frozen_parts(backend):
    """Frozen tables and keys get no gradient and do not change the gradients of others."""
    modules, _ = build("rpe-1.9-product-ctx-1-qk", 6, 2, False)
    terms = joined(modules, irpe.Grid(2, 3))
    q, k, v = tensors(1, 2, 6, 6, 6)
    free = irpe.attention(q, k, v, terms, backend=backend).square().sum()
    wanted = torch.autograd.grad(free, q)[0]
    for p in (p for m in modules for p in m.parameters()):
        p.requires_grad_(False)
    terms = joined(modules, irpe.Grid(2, 3))
    out = irpe.attention(q, k.detach(), v.detach(), terms, backend=backend).square().sum()
    torch.testing.assert_close(torch.autograd.grad(out, q)[0], wanted, rtol=1e-11, atol=1e-11)
    out = irpe.attention(q, k.detach(), v.detach(), terms, backend=backend).square().sum()
    again = torch.autograd.grad(out, q, create_graph=True)[0]
    torch.testing.assert_close(again, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", ("reference", "sdpa", "auto"))
def test_learned_mask(backend):
    """An additive mask that requires a gradient gets it; eager raises."""
    modules, encodings = build("rpe-1.9-product-ctx-1-k", 6, 2, False)
    terms = joined(modules, irpe.Grid(2, 3))
    q, k, v = tensors(1, 2, 6, 6, 6)
    mask = torch.randn(1, 1, 6, 6, dtype=F64, requires_grad=True)
    where = [plain.grid(2, 3)]
    full = mask.expand(1, 2, 6, 6)
    wanted = truth.attention(q, k, v, encodings, where, where, full).square().sum()
    out = irpe.attention(q, k, v, terms, mask=mask, backend=backend).square().sum()
    found, wanted = (torch.autograd.grad(x, mask)[0] for x in (out, wanted))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    with pytest.raises(irpe.IrpeError, match="eager.*mask"):
        irpe.attention(q, k, v, terms, mask=mask, backend="eager")


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    modules, _ = build("rpe-1.9-product-ctx-1-qk", 6, 2, False)
    q, k, v = tensors(0, 2, 6, 6, 6)
    out = irpe.attention(q, k, v, joined(modules, irpe.Grid(2, 3)), backend=backend)
    out.sum().backward()
    assert out.shape == (0, 2, 6, 6) and q.grad.shape == q.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_no_tokens(dtype, backend):
    modules, _ = build("rpe-1.9-product-ctx-1-k", 6, 2, False)
    grid = irpe.Grid(2, 3).select(torch.zeros(0, dtype=torch.long))
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in tensors(2, 2, 0, 0, 6))
    for terms in ((), joined([m.to(dtype) for m in modules], grid)):
        out = irpe.attention(q, k, v, terms, backend=backend)
        out.sum().backward()
        assert out.shape == (2, 2, 0, 6) and q.grad.shape == q.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_terms", [False, True])
def test_masks_without_axes(with_terms, backend):
    """Masks ``[]`` and ``[S]`` broadcast as those of four axes do."""
    modules, _ = build("rpe-1.9-product-ctx-1-k", 6, 2, False)
    terms = joined(modules, irpe.Grid(2, 3)) if with_terms else ()
    q, k, v = tensors(2, 2, 6, 6, 6)
    few = torch.tensor([True, False, True, True, False, True])
    for mask in (torch.tensor(True), torch.tensor(0.5), few, torch.where(few, 0.0, -torch.inf)):
        found = irpe.attention(q, k, v, terms, mask=mask, backend=backend)
        whole = mask.expand(2, 2, 6, 6)
        wanted = irpe.attention(q, k, v, terms, mask=whole, backend="reference")
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("backend", ("reference", "eager", *TILES, "sdpa"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared", [0, 1])
def test_low_precision(shared, dtype, backend):
    """Errors against float64 at most twice those of the same maths in plain low precision."""
    on = "qk" if backend == "sdpa" else "qkv"
    H, D, grid = 2, 60, irpe.Grid(7, 9)
    modules, _ = build(f"rpe-2.0-product-ctx-{shared}-{on}", D, H, False)
    for m in modules:
        torch.nn.init.normal_(m.table, std=0.3)
    low = [x.detach().to(dtype).requires_grad_() for x in tensors(2, H, 63, 63, D)]
    lower = [m.to(dtype) for m in modules]
    high = [x.detach().double().requires_grad_() for x in low]
    w = torch.randn(2, H, 63, D).to(dtype)
    tables = [m.table for m in lower]
    truth_tables = [t.detach().double().requires_grad_() for t in tables]
    plain_tables = [t.detach().clone().requires_grad_() for t in tables]
    ids = irpe.bucket_ids(f"rpe-2.0-product-ctx-{shared}-{on}", grid)[0]
    exact = _plain(high, truth_tables, ids)
    rough = _plain(low, plain_tables, ids)
    out = irpe.attention(*low, joined(lower, grid), backend=backend)
    assert out.dtype == dtype
    assert_as_good(out, rough, exact, "out")
    wanted = torch.autograd.grad((exact * w.double()).sum(), [*high, *truth_tables])
    plainly = torch.autograd.grad((rough * w).sum(), [*low, *plain_tables])
    found = torch.autograd.grad((out * w).sum(), [*low, *tables])
    for i, (a, b, c) in enumerate(zip(found, plainly, wanted, strict=True)):
        assert a.dtype == dtype
        assert_as_good(a, b, c, f"gradient {i}")


def _plain(qkv, tables, ids):
    """The textbook way: tables materialised for every pair of tokens."""
    q, k, v = qkv
    scale = q.shape[-1] ** -0.5
    on_q, on_k = tables[0][:, :, ids.T], tables[1][:, :, ids]  # [H | 1, D, L, S]
    logits = (q @ k.mT) * scale
    logits = logits + torch.einsum(
        "bhid,hdij->bhij", q * scale, on_k.expand(q.shape[1], -1, -1, -1)
    )
    logits = logits + torch.einsum(
        "bhjd,hdij->bhij", k * scale, on_q.expand(q.shape[1], -1, -1, -1)
    )
    p = logits.softmax(-1)
    out = p @ v
    if len(tables) == 3:
        values = tables[2][:, ids].expand(q.shape[1], -1, -1, -1)
        out = out + torch.einsum("bhij,hijd->bhid", p, values)
    return out


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
def test_lookup(dtype, per_sample):
    x = torch.randn(2, 3, 4, 7, dtype=F64, requires_grad=True)
    ids = torch.randint(7, (2, 4, 5) if per_sample else (4, 5), dtype=dtype)
    y = irpe.lookup(x, ids)
    assert y.shape == (2, 3, 4, 5)
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, y.shape)).tolist():
        n = ids[b, i, j] if per_sample else ids[i, j]
        assert y[b, h, i, j] == x[b, h, i, int(n)]
    assert torch.autograd.gradcheck(lambda z: irpe.lookup(z, ids), x)
    assert torch.autograd.gradgradcheck(lambda z: irpe.lookup(z, ids), x)


def test_explain_names_the_choice():
    modules, _ = build("rpe-1.9-product-ctx-1-kv", 6, 2, False)
    terms = joined(modules, irpe.Grid(2, 3))
    q, k, v = tensors(1, 2, 6, 6, 6)
    mask = torch.zeros(6, 6, dtype=F64, requires_grad=True)
    assert "backend eager" in irpe.explain(q, k, v, terms)
    said = irpe.explain(q, k, v, terms, mask=mask)
    assert "backend reference" in said and "not eager" in said and "mask" in said
    assert "backend sdpa" in irpe.explain(q, k, v)
