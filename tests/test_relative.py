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


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (8, 20), (64, 1000), (16, 65), (4, 3)])
def test_t5_buckets(buckets, most, both):
    keys = torch.arange(-3 * most, 3 * most + 1)
    line = irpe.Sequence(1, positions=torch.tensor([0]), keys=keys)
    spec = f"t5,buckets={buckets},max={most},bidirectional={int(both)}"
    found, size = irpe.bucket_ids(spec, line)
    wanted = [plain.t5_bucket(-int(x), buckets, most, both) for x in keys]
    assert found[0].tolist() == wanted and size == buckets == max(wanted) + 1


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
