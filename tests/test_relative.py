"""Shaw, Huang and T5: how they relate to one another, to plain attention and to image tables."""

import pytest
import torch
from oracles import text as plain
from oracles.precision import assert_as_good
from text import F64, modules

import irpe

D, H, L = 6, 2, 9
HUANG = tuple(f"huang{n},clip=3" for n in (1, 2, 3, 4))
ALL = (*HUANG, "shaw,clip=3", "shaw,clip=3,on=kv", "t5,buckets=8,max=20")


def tensors(length=L, batch=2):
    return [torch.randn(batch, H, length, D, dtype=F64) for _ in range(3)]


def module_of(spec, **options):
    (module,) = modules(spec, H, D, False, **options).values()
    return module


def logits(module, q, k, geometry):
    """What the softmax sees, from probabilities of one-hot values, up to a constant for a row."""
    eye = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:2], -1, -1)
    terms = tuple(t for t in module.terms(geometry) if t.kind != "value")
    rows = irpe.attention(q, k, eye, terms, backend="reference").log()
    return rows - rows[..., :1]


@pytest.mark.parametrize("spec", ALL)
def test_fresh_tables_change_nothing(spec):
    (fresh,) = irpe.build(spec, dim=H * D, num_heads=H, dtype=F64).values()
    q, k, v = tensors()
    found = irpe.attention(q, k, v, fresh.terms(irpe.Sequence(L)))
    torch.testing.assert_close(found, irpe.attention(q, k, v), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for p in fresh.parameters():
            p.normal_()
    assert not torch.allclose(irpe.attention(q, k, v, fresh.terms(irpe.Sequence(L))), found)


def test_method_4_is_both_sides_moved_less_their_product():
    """q.k + q.a + a.k = (q + a).(k + a) - a.a, and Shaw is that without the key's term."""
    module, shaw = module_of("huang4,clip=3"), module_of("shaw,clip=3")
    with torch.no_grad():
        shaw.table_k.copy_(module.table)
    q, k, v = tensors()
    ids, _ = irpe.bucket_ids("huang4,clip=3", irpe.Sequence(L))
    a = module.table[0][:, ids].permute(1, 2, 0)  # [L, S, D]
    moved = ((q.unsqueeze(3) + a) * (k.unsqueeze(2) + a) - a * a).sum(-1) * D**-0.5
    wanted = moved.softmax(-1) @ v
    found = irpe.attention(q, k, v, module.terms(irpe.Sequence(L)))
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    on_q, on_k = module.terms(irpe.Sequence(L))
    assert (on_q.kind, on_k.kind) == ("query", "key")
    without = irpe.attention(q, k, v, (on_q,))
    torch.testing.assert_close(without, irpe.attention(q, k, v, shaw.terms(irpe.Sequence(L))))


def test_methods_1_to_3_are_special_cases_of_one_another():
    one, two, three = (module_of(f"huang{n},clip=3,shared=0") for n in (1, 2, 3))
    with torch.no_grad():
        two.table.copy_(torch.cat((one.table.flip(-1), one.table[:, 1:]), -1))
        three.table.copy_(two.table.unsqueeze(1).expand(-1, D, -1))
    q, k, v = tensors()
    first, second, third = (
        irpe.attention(q, k, v, m.terms(irpe.Sequence(L))) for m in (one, two, three)
    )
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(second, third, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("spec", ALL)
def test_constant_content_gives_a_toeplitz_matrix(spec):
    module = module_of(spec)
    q, k = (torch.randn(1, H, 1, D, dtype=F64).expand(-1, -1, L, -1) for _ in range(2))
    rows = logits(module, q, k, irpe.Sequence(L))
    steps = rows.diff(dim=-1)  # free of the constant of a row
    torch.testing.assert_close(steps[..., 1:, 1:], steps[..., :-1, :-1], rtol=1e-9, atol=1e-9)
    assert steps.std() > 0.01


@pytest.mark.parametrize("spec", ALL)
def test_only_differences_of_positions_count(spec):
    module, (q, k, v) = module_of(spec), tensors()
    where = torch.tensor([0, 1, 2, 5, 6, 11, 12, 13, 30])
    first, second = (
        irpe.attention(q, k, v, module.terms(irpe.Sequence(L, positions=where + shift)))
        for shift in (0, 12345)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("spec", HUANG)
def test_reversal(spec):
    """Method 1 does not depend on direction; the others do, except with mirrored tables."""
    module, (q, k, v) = module_of(spec), tensors()
    geometry = irpe.Sequence(L)

    def both():
        there = irpe.attention(q, k, v, module.terms(geometry)).flip(2)
        return there, irpe.attention(q.flip(2), k.flip(2), v.flip(2), module.terms(geometry))

    assert torch.allclose(*both()) == (spec[:6] == "huang1")
    if spec[:6] != "huang1":
        with torch.no_grad():
            module.table.add_(module.table.flip(-1).clone())
        torch.testing.assert_close(*both(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("spec", ALL)
def test_far_distances_are_alike_and_more_tokens_move_no_row(spec):
    module, (q, k, _) = module_of(spec), tensors(40)
    rows = logits(module, q[:, :, :1], k, irpe.Sequence(1, keys=torch.arange(40)))
    grown = logits(module, q[:, :, :1], k[:, :, :20], irpe.Sequence(1, keys=torch.arange(20)))
    torch.testing.assert_close(rows[..., :20], grown, rtol=1e-9, atol=1e-9)
    far = module.function(-torch.arange(20, 4000).unsqueeze(-1))
    assert (far == far[0]).all()


def test_method_4_with_absolute_tables_is_x_plus_p():
    """With a_ij = p_i at the query and p_j at the key, all of (x + p).(x + p) but p.p is there."""
    q, k, v = tensors(batch=1)
    p, r = (torch.randn(L, D, dtype=F64) for _ in range(2))
    # A bucket for each key, one row of the table for each: absolute positions by way of a grid.
    from irpe.buckets import BucketIds, ClipBuckets

    keys = irpe.Sequence(L, positions=torch.zeros(L, dtype=torch.int64), keys=torch.arange(L))
    queries = irpe.Sequence(L, positions=torch.arange(L), keys=torch.zeros(L, dtype=torch.int64))
    rows = torch.zeros(1, D, 2 * L + 1, dtype=F64)
    on_q, on_k = rows.clone(), rows.clone()
    on_q[0, :, L - torch.arange(L)] = r.T  # offset 0 - j indexes the vector of the query: q_i . r_j
    on_k[0, :, L - torch.arange(L)] = p.T  # offset 0 - i, seen from the key: k_j . p_i
    clip = ClipBuckets(L)
    terms = (
        irpe.Term("query", on_q, BucketIds(clip, keys)),
        irpe.Term("key", on_k, BucketIds(clip, queries)),
    )
    found = irpe.attention(q, k, v, terms)
    wanted = ((q + p) @ (k + r).mT - p @ r.T) * D**-0.5
    torch.testing.assert_close(found, wanted.softmax(-1) @ v, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("width", [7, 16])
def test_tables_on_a_row_of_patches(width):
    """Shaw is iRPE on keys, M4 iRPE on queries and keys with a mirrored table, on a 1xW grid."""
    q, k, v = tensors(width)
    grid, line = irpe.Grid(1, width), irpe.Sequence(width)
    rpe_q, rpe_k, _ = irpe.build_rpe(
        "rpe-2.0-product-ctx-1-qk,index=clip,beta=3",
        head_dim=D, num_heads=H, prefix=0, dtype=F64,
    )  # fmt: skip
    middle = slice(3 * 7, 4 * 7)  # buckets of row offset 0
    module = module_of("huang4,clip=3")
    with torch.no_grad():
        rpe_k.table[..., middle] = module.table
        rpe_q.table[..., middle] = module.table.flip(-1)
    shaw = irpe.attention(q, k, v, module.terms(line)[:1])
    torch.testing.assert_close(irpe.attention(q, k, v, rpe_k.terms(grid)), shaw)
    both = irpe.attention(q, k, v, rpe_k.terms(grid) + rpe_q.terms(grid))
    torch.testing.assert_close(both, irpe.attention(q, k, v, module.terms(line)))
    assert not torch.allclose(shaw, both)


def test_t5_is_a_bias_of_its_buckets():
    module, (q, k, v) = module_of("t5,buckets=8,max=20"), tensors()
    ids, size = irpe.bucket_ids("t5,buckets=8,max=20", irpe.Sequence(L))
    assert size == 8
    wanted = (q @ k.mT * D**-0.5 + module.table[:, ids]).softmax(-1) @ v
    found = irpe.attention(q, k, v, module.terms(irpe.Sequence(L)))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (8, 20), (64, 1000), (16, 65), (4, 3)])
def test_t5_buckets(buckets, most, both):
    from irpe.encodings.t5 import log_buckets

    function = log_buckets(irpe.parse(f"t5,buckets={buckets},max={most}"), both)
    offsets = torch.arange(-3 * most, 3 * most + 1)
    found = function(offsets.unsqueeze(-1)).tolist()
    assert found == [plain.t5_bucket(int(x), buckets, most, both) for x in offsets]
    assert function.size == buckets and max(found) == buckets - 1


@pytest.mark.parametrize("spec", ["shaw,clip=3", "huang1,clip=3", "huang4,clip=5"])
def test_clipped_buckets(spec):
    parsed = irpe.parse(spec)
    ids, size = irpe.bucket_ids(spec, irpe.Sequence(12))
    signed = spec[:6] != "huang1"
    for i in range(12):
        for j in range(12):
            clipped = plain.clip(i - j, parsed.clip)
            assert ids[i, j] == (clipped + parsed.clip if signed else abs(clipped))
    assert size == (2 if signed else 1) * parsed.clip + 1
    with_prefix, more = irpe.bucket_ids(spec, irpe.Sequence(12, prefix=2))
    assert (
        more == size + 1 and (with_prefix[:2] == size).all() and (with_prefix[:, :2] == size).all()
    )
    assert torch.equal(with_prefix[2:, 2:], ids)


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("spec", ["huang1,clip=2,shared=0", "huang2,clip=2", "huang3,clip=2"])
def test_second_derivatives(spec, backend):
    module = module_of(spec)
    q, k, v = (x[:1, :, :4].clone().requires_grad_() for x in tensors())

    def call(q, k, v, table):
        return irpe.attention(q, k, v, module.terms(irpe.Sequence(4)), backend=backend)

    inputs = (q, k, v, module.table)
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_several_multipliers_multiply(backend):
    """Gains and channels of several encodings, and a bias beside them."""
    made = [module_of(s) for s in ("huang1,clip=2", "huang2,clip=3,shared=0", "huang3,clip=2")]
    made += [module_of("huang3,clip=3,shared=0"), module_of("t5,buckets=8,max=20")]
    q, k, v = (x.requires_grad_() for x in tensors())
    geometry = irpe.Sequence(L)
    tables = [p for m in made for p in m.parameters()]
    ids = [m.terms(geometry)[0].buckets.dense(torch.device("cpu")) for m in made]
    factor = [m.table[..., n] for m, n in zip(made, ids, strict=True)]
    content = torch.einsum("bhic,bhjc,ocij,hcij->bhij", q, k, factor[2], factor[3])
    rows = content * factor[0] * factor[1] * D**-0.5 + factor[4]
    wanted = rows.softmax(-1) @ v
    terms = sum((m.terms(geometry) for m in made), ())
    found = irpe.attention(q, k, v, terms, backend=backend)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    ours, theirs = (
        torch.autograd.grad(x.square().sum(), [q, k, v, *tables]) for x in (found, wanted)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_channels_in_tiles(monkeypatch):
    """A few queries at a time, down to one, give the same numbers and gradients."""
    from irpe.backends import eager
    from irpe.backends.eager import workspace

    module, (q, k, v) = module_of("huang3,clip=3,shared=0"), tensors()
    where = torch.stack((torch.arange(L), torch.arange(L) * 2))
    outcomes = []
    for size, keeps in ((2**20, True), (1, True), (1, False), (3 * 2 * H * L * D, False)):
        monkeypatch.setattr(workspace, "SIZE", size)
        monkeypatch.setattr(eager, "keeps", lambda call, keeps=keeps: keeps)
        terms = module.terms(irpe.Sequence(L, positions=where))
        inputs = [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), module.table]
        out = irpe.attention(q, k, v, terms, backend="eager")
        outcomes.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for found in outcomes[1:]:
        for a, b in zip(found, outcomes[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "spec", ["huang1,clip=16", "huang3,clip=16", "huang4,clip=16", "alibi", "t5,buckets=32,max=128"]
)
def test_low_precision(spec, dtype, backend):
    """Errors against float64 at most twice those of the same maths in plain low precision."""
    if backend == "sdpa" and spec[:6] in ("huang1", "huang3"):
        pytest.skip("sdpa has no term that multiplies")
    H, D, L = 2, 60, 63
    (module,) = irpe.build(spec, dim=H * D, num_heads=H).values()
    for p in module.parameters():
        torch.nn.init.normal_(p, 1.0 if spec[:6] in ("huang1", "huang3") else 0.0, 0.3)
    module = module.to(dtype)
    low = [torch.randn(2, H, L, D).to(dtype).requires_grad_() for _ in range(3)]
    high = [x.detach().double().requires_grad_() for x in low]
    tables = list(module.parameters())
    copies = [
        [p.detach().to(kind).clone().requires_grad_() for p in tables] for kind in (F64, dtype)
    ]
    exact, rough = _plain(spec, high, copies[0]), _plain(spec, low, copies[1])
    out = irpe.attention(*low, module.terms(irpe.Sequence(L)), backend=backend)
    assert out.dtype == dtype
    assert_as_good(out, rough, exact, "out")
    w = torch.randn(2, H, L, D).to(dtype)
    wanted = torch.autograd.grad((exact * w.double()).sum(), [*high, *copies[0]])
    plainly = torch.autograd.grad((rough * w).sum(), [*low, *copies[1]])
    found = torch.autograd.grad((out * w).sum(), [*low, *tables])
    for i, (a, b, c) in enumerate(zip(found, plainly, wanted, strict=True)):
        assert a.dtype == dtype
        assert_as_good(a, b, c, f"gradient {i}")


def _plain(spec, qkv, tables):
    """The textbook way, everything materialised for every pair, in the inputs' dtype."""
    q, k, v = qkv
    scale, L = q.shape[-1] ** -0.5, q.shape[2]
    if spec == "alibi":
        far = (torch.arange(L)[:, None] - torch.arange(L)).abs()
        slopes = torch.tensor(plain.slopes(q.shape[1]), dtype=F64)[:, None, None]
        return (q @ k.mT * scale - (slopes * far).to(q.dtype)).softmax(-1) @ v
    ids, _ = irpe.bucket_ids(spec, irpe.Sequence(L))
    rows = tables[0][..., ids]
    if spec[:6] == "huang1":
        return ((q @ k.mT * scale) * rows).softmax(-1) @ v
    if spec[:2] == "t5":
        return (q @ k.mT * scale + rows).softmax(-1) @ v
    if spec[:6] == "huang3":
        return (
            torch.einsum("bhic,hcij,bhjc->bhij", q * scale, rows.expand(2, -1, -1, -1), k).softmax(
                -1
            )
            @ v
        )
    on_q = torch.einsum("bhic,cij->bhij", q * scale, rows[0])
    on_k = torch.einsum("bhjc,cij->bhij", k * scale, rows[0])
    return (q @ k.mT * scale + on_q + on_k).softmax(-1) @ v
