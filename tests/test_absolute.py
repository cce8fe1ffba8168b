"""Sinusoids, learned tables, their interpolation, and position-infused attention."""

import pytest
import torch
from oracles import text as plain
from text import F64

import irpe


def embedding(spec, dim=12, **options):
    (module,) = irpe.build(spec, dim=dim, num_heads=2, dtype=F64, **options).values()
    return module


@pytest.mark.parametrize("dim", [2, 4, 7, 12])
@pytest.mark.parametrize("form", ["paper", "fairseq"])
def test_sinusoids(form, dim):
    if form == "fairseq" and dim == 2:
        pytest.skip("fairseq divides by zero there; ours has frequency 1")
    if form == "fairseq" and dim == 7:
        dim = 9
    spec = f"sinusoidal,form={form}" if form == "fairseq" else "sinusoidal"
    (module,) = irpe.build(spec, dim=dim, num_heads=1).values()
    where = torch.tensor([[0.0, 1.0, 2.5, 900.0], [5.0, 6.0, 7.0, 8.0]], dtype=F64)
    x = torch.randn(2, 4, dim, dtype=F64)
    found = module.embed(x, irpe.Sequence(4, positions=where))
    for b in range(2):
        for i in range(4):
            row = torch.tensor(plain.sinusoid(float(where[b, i]), dim, form), dtype=F64)
            torch.testing.assert_close(found[b, i], x[b, i] + row, rtol=1e-11, atol=1e-11)


def test_sinusoids_have_no_buffers_and_are_made_in_float64():
    module = embedding("sinusoidal").bfloat16()
    x = torch.zeros(1, 4000, 12, dtype=torch.bfloat16)
    wanted = embedding("sinusoidal").embed(x.double(), irpe.Sequence(4000))
    assert torch.equal(module.embed(x, irpe.Sequence(4000)), wanted.bfloat16())
    assert not list(module.buffers()) and not list(module.parameters())


@pytest.mark.parametrize("spec", ["sinusoidal", "learned,length=9"])
def test_absolute_embeddings_leave_prefix_tokens_alone(spec):
    module, x = embedding(spec), torch.randn(2, 9, 12, dtype=F64)
    found = module.embed(x, irpe.Sequence(7, prefix=2))
    assert torch.equal(found[:, :2], x[:, :2])
    torch.testing.assert_close(found[:, 2:], module.embed(x[:, 2:], irpe.Sequence(7)))


@pytest.mark.parametrize("spec", ["sinusoidal", "learned,length=40", "pia"])
def test_absolute_embeddings_know_where_the_start_is(spec):
    """A constant added to all positions changes them (rotary embeddings do not mind)."""
    module, x = embedding(spec), torch.zeros(1, 5, 12, dtype=F64)
    for hook in (module.embed, lambda x, g: module.inputs(x, x, g)[0]):
        here, there = (
            hook(x, irpe.Sequence(5, positions=torch.arange(5) + start)) for start in (0, 5)
        )
        changes = (spec == "pia") == (hook != module.embed)
        assert torch.allclose(here, there) is not changes


def test_learned_rows():
    module = embedding("learned,length=40")
    where = torch.tensor([[0, 3, 4, 39], [7, 8, 9, 10]])
    x = torch.randn(2, 4, 12, dtype=F64, requires_grad=True)
    found = module.embed(x, irpe.Sequence(4, positions=where))
    torch.testing.assert_close(found, x + module.weight[where])
    found.sum().backward()
    assert (module.weight.grad[[0, 3, 39]] == 1).all() and (module.weight.grad[20] == 0).all()
    assert 0.015 < module.weight.std() < 0.025 and module.weight.shape == (40, 12)


def table(n=6, c=3, dtype=F64):
    return torch.randn(n, c, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("length", [6, 7, 9, 12, 24, 100])
@pytest.mark.parametrize("anchor", ["left", "corners", "half_pixel"])
def test_interpolate(anchor, length):
    rows = table()
    found = irpe.interpolate(rows, length, anchor)
    wanted = torch.tensor(plain.interpolated(rows.tolist(), length, anchor), dtype=F64)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert found.requires_grad and found.dtype == F64
    if length == 6:
        assert found is rows
    # Each row lies between its two parents.
    low = torch.minimum(rows[:-1], rows[1:]).min(0).values
    assert (found >= low - 1e-12).all()
    weights = torch.autograd.functional.jacobian(
        lambda t: irpe.interpolate(t, length, anchor)[:, 0], rows.detach()
    )[..., 0]
    assert (weights >= 0).all() and ((weights > 1e-12).sum(1) <= 2).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(length, dtype=F64))
    both = weights > 1e-12
    first = both.int().argmax(1)
    assert all(row[: f + 2].sum() == row.sum() for row, f in zip(both, first, strict=True))


def test_interpolate_keeps_its_anchors():
    rows = table()
    left = irpe.interpolate(rows, 24, "left")
    assert torch.equal(left[::4], rows) and torch.equal(left[20:], rows[-1:].expand(4, -1))
    corners = irpe.interpolate(rows, 26, "corners")
    assert torch.equal(corners[::5], rows)
    image = torch.nn.functional.interpolate(rows.T[None], 24, mode="linear")[0].T
    torch.testing.assert_close(irpe.interpolate(rows, 24, "half_pixel"), image)
    assert not torch.allclose(left, image)
    corner = torch.nn.functional.interpolate(rows.T[None], 25, mode="linear", align_corners=True)
    torch.testing.assert_close(irpe.interpolate(rows, 25, "corners"), corner[0].T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_interpolate_in_low_precision_keeps_rows(dtype):
    rows = table(dtype=dtype)
    found = irpe.interpolate(rows, 600, "left")
    assert found.dtype == dtype and torch.equal(found[::100], rows)


def test_learned_table_interpolated_by_its_spec():
    long = embedding("learned,length=6,interpolate=left,to=24")
    x = torch.randn(1, 24, 12, dtype=F64)
    found = long.embed(x, irpe.Sequence(24))
    torch.testing.assert_close(found, x + irpe.interpolate(long.weight, 24, "left"))
    assert dict(long.named_parameters()).keys() == {"weight"} and long.weight.shape == (6, 12)
    found.square().sum().backward()
    assert (long.weight.grad != 0).all()


def refuses(call, *parts):
    with pytest.raises(irpe.IrpeError) as caught:
        call()
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_what_absolute_embeddings_refuse():
    short, x = embedding("learned,length=6"), torch.randn(1, 9, 12, dtype=F64)
    refuses(lambda: short.embed(x, irpe.Sequence(9)), "0 to 5", "0 to 8", "interpolate=left,to=9")
    ahead = irpe.Sequence(9, positions=torch.arange(-1, 8))
    refuses(lambda: short.embed(x, ahead), "-1 to 7")
    halves = irpe.Sequence(9, positions=torch.arange(9) / 2)
    refuses(lambda: short.embed(x, halves), "integer", "float32")
    for spec in ("learned,length=9", "sinusoidal"):
        refuses(lambda s=spec: embedding(s).embed(x, irpe.Grid(3, 3)), "one axis", "Grid(3, 3")
        refuses(lambda s=spec: embedding(s).embed(x, None), "None", "irpe.Sequence")
    refuses(lambda: embedding("pia").inputs(x, x, irpe.Grid(3, 3)), "one axis", "pia")
    rows = table()
    refuses(lambda: irpe.interpolate(rows, 5, "left"), "length=5", "6 rows")
    refuses(lambda: irpe.interpolate(rows, 12, "right"), "'right'", "left, corners, half_pixel")
    refuses(lambda: irpe.interpolate(rows[0], 12), "[N, C]", "[3]")


def pia_layer(dim=12):
    torch.manual_seed(3)
    return irpe.RPEAttention(dim, 2, "pia", prefix=0, causal=True, dtype=F64)


def test_pia_against_loops():
    layer, x = pia_layer(), torch.randn(1, 5, 12, dtype=F64, requires_grad=True)
    where = [0, 1, 4, 5, 9]
    rows = torch.tensor([plain.sinusoid(p, 12, "fairseq") for p in where], dtype=F64)
    weights, biases = layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3)
    q, k, v = (
        (y @ w.T + b).view(1, 5, 2, 6).transpose(1, 2)
        for y, w, b in zip((x + rows, x + rows, x), weights, biases, strict=True)
    )
    logit = lambda b, h, i, j: (q[b, h, i] * k[b, h, j]).sum() * 6**-0.5  # noqa: E731
    out = plain.attention(q, k, v, logit, is_causal=True)
    wanted = layer.proj(out.transpose(1, 2).reshape(1, 5, 12))
    found = layer(x, irpe.Sequence(5, positions=torch.tensor(where)))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    inputs = [x, *layer.parameters()]
    ours, theirs = (torch.autograd.grad(y.square().sum(), inputs) for y in (found, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_pia_values_carry_no_position():
    """With queries of zero attention is uniform, and the order of the keys is not seen."""
    layer = irpe.RPEAttention(12, 2, "pia", prefix=0, dtype=F64)
    with torch.no_grad():
        layer.qkv.weight[:12] = 0
        layer.qkv.bias[:12] = 0
    x, order = torch.randn(1, 6, 12, dtype=F64), torch.randperm(6)
    found = layer(x, irpe.Sequence(6))
    torch.testing.assert_close(layer(x[:, order], irpe.Sequence(6)), found, rtol=1e-12, atol=1e-12)


def test_pia_leaves_the_prefix_of_each_side_alone():
    like = torch.zeros(1, dtype=F64)
    on_q, on_k = embedding("pia").waves(irpe.Sequence(4, prefix=1, key_prefix=3), like)
    assert not on_q[:1].any() and not on_k[:3].any()
    assert torch.equal(on_q[1:], on_k[3:]) and on_q[1:].any()


def test_pia_with_memory_block_by_block_is_token_by_token():
    """One layer: cached inputs get new positions, 0 to M - 1, and new tokens those after."""
    layer = pia_layer()
    pia, memory, x = layer.pia, *(torch.randn(1, n, 12, dtype=F64) for n in (4, 3))

    def attend(new, every, queries, keys):
        geometry = irpe.Sequence(len(queries), positions=torch.tensor(queries), keys=keys)
        on_q, on_k = pia.inputs(new, every, geometry)
        weights, biases = layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3)
        q, k, v = (
            (y @ w.T + b).unflatten(-1, (2, 6)).transpose(1, 2)
            for y, w, b in zip((on_q, on_k, every), weights, biases, strict=True)
        )
        return irpe.attention(q, k, v, is_causal=True)

    block = attend(x, torch.cat((memory, x), 1), [4, 5, 6], torch.arange(7))
    for t in range(3):
        every = torch.cat((memory, x[:, : t + 1]), 1)
        one = attend(x[:, t : t + 1], every, [4 + t], torch.arange(5 + t))
        torch.testing.assert_close(one, block[:, :, t : t + 1], rtol=1e-12, atol=1e-12)
    # A cache may keep what is projected: Wk (y + p) = Wk y + Wk p.
    geometry = irpe.Sequence(3, positions=torch.arange(4, 7), keys=torch.arange(7))
    every, weight = torch.cat((memory, x), 1), layer.qkv.weight[12:24]
    waves = pia.waves(geometry, x)[1]
    assert waves.shape == (7, 12)
    parts = every @ weight.T + waves @ weight.T
    torch.testing.assert_close((every + waves) @ weight.T, parts, rtol=1e-11, atol=1e-11)


def test_pia_is_not_shift_invariant():
    layer, x = pia_layer(), torch.randn(1, 6, 12, dtype=F64)
    moved = layer(x, irpe.Sequence(6, positions=torch.arange(5, 11)))
    assert (moved - layer(x, irpe.Sequence(6))).abs().max() > 1e-3
