"""ALiBi: its slopes, its bias, and how exactly two extra channels hold it."""

import pytest
import torch
import torch.nn.functional as F
from oracles import text as plain
from oracles.precision import assert_as_good
from text import F64

import irpe
from irpe.backends.sdpa import with_slope
from irpe.encodings.alibi import alibi_slopes
from irpe.functional import validated


def alibi(H=4, D=8, causal=True, prefix=0, **options):
    made = irpe.build("alibi", dim=H * D, num_heads=H, causal=causal, prefix=int(prefix), **options)
    return made["alibi"]


def rows(module, q, k, geometry, is_causal=True):
    """Logarithms of probabilities."""
    eye = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:2], -1, -1)
    scale = q.shape[-1] ** -0.5
    terms = module.terms(geometry)
    return irpe.attention(q, k, eye, terms, is_causal=is_causal, scale=scale).log()


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 40])
def test_slopes(heads):
    found = alibi_slopes(heads)
    assert len(found) == heads and found == pytest.approx(plain.slopes(heads), rel=1e-12)
    if heads == 8:
        assert found == tuple(2.0**-h for h in range(1, 9))
    if heads == 12:
        assert found[8:] == pytest.approx([0.70711, 0.35355, 0.17678, 0.08839], abs=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("where", [[0, 1, 2, 3, 4], [0, 3, 4, 90, 5000]])
def test_bias_is_the_slope_times_the_distance(where, causal):
    """Also across gaps; without content the softmax shows the bias, up to its row's constant."""
    zero = torch.zeros(1, 4, 5, 8, dtype=F64)
    found = rows(alibi(causal=causal), zero, zero, irpe.Sequence(5, positions=torch.tensor(where)))
    for h, slope in enumerate(plain.slopes(4)):
        for i in range(5):
            for j in range(i + 1):
                wanted = -slope * (where[i] - where[j])
                got = found[0, h, i, j] - found[0, h, i, i]
                assert got == pytest.approx(wanted, abs=1e-10) or wanted < -700  # 0 as a float


def test_toeplitz():
    q, k = (torch.randn(1, 4, 1, 8, dtype=F64).expand(-1, -1, 9, -1) for _ in range(2))
    found = rows(alibi(), q, k, irpe.Sequence(9)).tril()
    steps = (found - found.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)).tril()
    torch.testing.assert_close(steps[..., 1:, 1:], steps[..., :-1, :-1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("H", [1, 3, 4, 12])
def test_extra_channels_are_the_bias_under_a_causal_mask(H):
    low = [torch.randn(2, H, 9, 6).bfloat16().requires_grad_() for _ in range(3)]
    high = [x.detach().double().requires_grad_() for x in low]
    where = torch.stack((torch.arange(9), torch.arange(9) * 7 + 100))
    terms = alibi(H, 6).terms(irpe.Sequence(9, positions=where))
    assert "extra channels" in irpe.explain(*low, terms, is_causal=True)
    assert "extra channels" not in irpe.explain(*high, terms, is_causal=True)
    outs = []
    for qkv, backend in ((low, "auto"), (low, "reference"), (high, "reference")):
        out = irpe.attention(*qkv, terms, is_causal=True, backend=backend)
        outs.append([out, *torch.autograd.grad(out.square().sum(), qkv)])
    for name, *results in zip(("out", "q", "k", "v"), *outs, strict=True):
        assert_as_good(*results, name)


def test_plain_causal_attention_serves(monkeypatch):
    """No mask, no bias, torch's own causal attention."""
    seen = []
    plainly = F.scaled_dot_product_attention

    def spy(*args, **given):
        seen.append(given)
        return plainly(*args, **given)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    layer = irpe.RPEAttention(32, 4, "alibi", causal=True, dtype=torch.bfloat16)
    layer(torch.randn(2, 9, 32, dtype=torch.bfloat16), irpe.Sequence(9))
    assert [(g["attn_mask"], g["is_causal"], g["scale"]) for g in seen] == [(None, True, 8**-0.5)]


@pytest.mark.parametrize("D", [16, 60, 64, 256])
@pytest.mark.parametrize("H", [8, 12])
@pytest.mark.parametrize(
    ("dtype", "last"), [(torch.bfloat16, 2**16), (torch.float16, 2**21), (torch.float32, 2**24)]
)
def test_two_channels_hold_a_position(dtype, last, H, D):
    """Exactly, where slopes and scale are powers of two; else to the roundings of both parts."""
    where = torch.tensor([0, 1, 2, 255, 256, 257, 999, 12345, last - 300, last - 2, last - 1])
    q = torch.zeros(1, H, 1, D, dtype=dtype)
    k = torch.zeros(1, H, len(where), D, dtype=dtype)
    # Positions count from the query: the first key's shows what the channels hold.
    geometry = irpe.Sequence(1, positions=where[:1], keys=where)
    (term,) = alibi(H, D).terms(geometry)
    call = validated(q, k, k, (term,), None, True, 0.0, None)
    on_q, on_k = with_slope(call, term.table, geometry, k)
    assert torch.isfinite(on_q).all() and torch.isfinite(on_k).all()
    found = (on_q.double() @ on_k.double().mT)[0, :, 0] * D**-0.5
    wanted = torch.tensor(plain.slopes(H), dtype=F64)[:, None] * where
    if H == 8 and D in (16, 64, 256):
        assert torch.equal(found, wanted)
    allowed = 2 * (torch.finfo(dtype).eps / 2) ** 2
    assert ((found - wanted).abs() <= max(allowed, 1e-15) * wanted + 2**-16).all()


@pytest.mark.parametrize("start", [0, 3000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("H", [8, 12])
def test_low_precision(H, dtype, start):
    """As good as a bias in float32, also where a position alone does not fit into the dtype."""
    L, D = 200, 60
    low = [torch.randn(1, H, L, D).to(dtype).requires_grad_() for _ in range(3)]
    high = [x.detach().double().requires_grad_() for x in low]
    geometry = irpe.Sequence(L, positions=torch.arange(start, start + L))
    far = (torch.arange(L)[:, None] - torch.arange(L)).double()
    bias = -torch.tensor(plain.slopes(H), dtype=F64)[:, None, None] * far
    bias = bias.masked_fill(far < 0, -torch.inf)
    exact = F.scaled_dot_product_attention(*high, attn_mask=bias)
    # The bias in float32, which torch allows beside a lower dtype: no rounding but the logits'.
    rough = ((low[0] @ low[1].mT).float() * D**-0.5 + bias.float()).softmax(-1).to(dtype) @ low[2]
    terms = alibi(H, D).to(dtype).terms(geometry)
    out = irpe.attention(*low, terms, is_causal=True)
    assert out.dtype == dtype
    assert_as_good(out, rough, exact, "out")
    w = torch.randn(out.shape).to(dtype)
    wanted = torch.autograd.grad((exact * w.double()).sum(), high)
    plainly = torch.autograd.grad((rough * w).sum(), low)
    found = torch.autograd.grad((out * w).sum(), low)
    for name, a, b, c in zip("qkv", found, plainly, wanted, strict=True):
        assert_as_good(a, b, c, name)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("steps", [(1,) * 5, (3, 2)])
def test_decoding_is_the_full_forward(steps, prefix):
    module, L = alibi(), 9 + prefix
    q, k, v = (torch.randn(2, 4, L, 8, dtype=F64) for _ in range(3))
    terms = module.terms(irpe.Sequence(9, prefix=prefix))
    wanted = irpe.attention(q, k, v, terms, is_causal=True)
    done = 4 + prefix
    for step in steps:
        new = slice(done, done + step)
        done += step
        where = torch.arange(done - prefix)
        every = irpe.Sequence(step, positions=where[-step:], keys=where, key_prefix=prefix)
        terms = module.terms(every)
        found = irpe.attention(q[:, :, new], k[:, :, :done], v[:, :, :done], terms, is_causal=True)
        torch.testing.assert_close(found, wanted[:, :, new], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("causal", [True, False])
def test_no_to_rounds_a_slope(causal):
    module = alibi(12, 8, causal)
    q, k = (torch.randn(1, 12, 9, 8, dtype=F64) for _ in range(2))
    before = rows(module, q, k, irpe.Sequence(9))
    module.bfloat16().half().double()
    assert torch.equal(rows(module, q, k, irpe.Sequence(9)), before)
    assert module.state_dict() == {} and not list(module.parameters())


@pytest.mark.parametrize("backend", ["reference", "eager", "sdpa"])
@pytest.mark.parametrize("heads", [1, 3])
def test_a_slope_that_learns(heads, backend):
    """Nobody's slopes do so far, but a term's table is a table."""
    from irpe.buckets import BucketIds, OneBucket

    slope = torch.randn(heads, 1, dtype=F64, requires_grad=True)
    q, k, v = (torch.randn(2, 3, 9, 6, dtype=F64, requires_grad=True) for _ in range(3))
    where = torch.stack((torch.arange(9), torch.arange(9) * 2))
    for geometry in (irpe.Sequence(9), irpe.Sequence(9, positions=where), irpe.Grid(3, 3)):
        offsets = geometry.offsets(torch.device("cpu")).double()
        far = offsets.square().sum(-1).sqrt()
        far = far.unsqueeze(1) if far.dim() == 3 else far
        wanted = (q @ k.mT * 6**-0.5 + slope[..., None] * far).softmax(-1) @ v
        term = irpe.Term("slope", slope, BucketIds(OneBucket(), geometry))
        found = irpe.attention(q, k, v, (term,), backend=backend)
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
        ours, theirs = (
            torch.autograd.grad(x.square().sum(), (q, k, v, slope)) for x in (found, wanted)
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.cases(1)
@pytest.mark.parametrize("where", [[0, 1, 5, 4, 9], [4, 3, 2, 1, 0], [0, 1, 0, 1, 2]])
@pytest.mark.parametrize("compiled", [False, True])
def test_positions_that_do_not_increase_take_the_distance(where, compiled):
    q, k, v = (torch.randn(1, 4, 5, 8, dtype=F64) for _ in range(3))
    module, at = alibi(), torch.tensor(where)

    def run(q, k, v, at, backend):
        terms = module.terms(irpe.Sequence(5, positions=at))
        return irpe.attention(q, k, v, terms, is_causal=True, backend=backend)

    wanted = run(q, k, v, at, "reference")
    call = torch.compile(run, fullgraph=True) if compiled else run
    torch.testing.assert_close(call(q, k, v, at, "auto"), wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_texts_round_no_more_than_a_bias(dtype):
    low = [torch.randn(1, 3, 1500, 8).to(dtype) for _ in range(3)]
    terms, high = alibi(3).terms(irpe.Sequence(1500)), [x.double() for x in low]
    outs = [
        irpe.attention(*qkv, terms, is_causal=True, backend=backend)
        for qkv, backend in ((low, "auto"), (low, "reference"), (high, "reference"))
    ]
    assert_as_good(*outs, "out")
