"""Linear attention: rotation in the numerator only, running sums, and the recurrent step."""

import pytest
import torch
from oracles import text as plain
from text import F64, places, rotation

import irpe
from irpe import linear


def rope(spec="rope", D=6, H=2):
    return irpe.build(spec, dim=H * D, num_heads=H)["rope"]


def tensors(L=9, S=9, B=2, G=2, dtype=F64):
    q = torch.randn(B, 2, L, 6, dtype=dtype, requires_grad=True)
    k = torch.randn(B, G, S, 6, dtype=dtype, requires_grad=True)
    v = torch.randn(B, G, S, 5, dtype=dtype, requires_grad=True)
    return q, k, v


@pytest.mark.cases(2)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("where", ["whole", "own", "cached", "prefix", "fractions"])
def test_against_loops(where, causal):
    geometry, queries, keys = places(where)
    q, k, v = tensors(len(queries[0]), len(keys[0]))
    turn = rotation("rope", None, 6)
    wanted = plain.linear_attention(
        q, k, v,
        lambda b, h, i, x: turn(h, queries[b][i], x),
        lambda b, h, j, x: turn(h, keys[b][j], x),
        causal,
    )  # fmt: skip
    found = irpe.linear.attention(q, k, v, rope(), geometry, is_causal=causal)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    ours, theirs = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (found, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def quadratic(q, k, v, module, geometry, seen=None):
    """[L, S] weights, rotated above and not below."""
    fq, fk = linear.elu_features(q), linear.elu_features(k)
    rq, rk = module.transform(fq, fk, geometry)
    L, S = q.shape[2], k.shape[2]
    open_ = torch.ones(L, S, dtype=F64).tril(S - L)
    open_ = open_ if seen is None else open_ * seen[:, None, None]
    return ((rq @ rk.mT) * open_ @ v) / ((fq @ fk.mT) * open_).sum(-1, keepdim=True)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize(("L", "S"), [(63, 63), (64, 64), (130, 130), (5, 100), (100, 130)])
def test_running_sums_are_the_quadratic_form(L, S, chunk, monkeypatch):
    monkeypatch.setattr(linear, "CHUNK", chunk)
    q, k, v = tensors(L, S)
    geometry = irpe.Sequence(L, positions=torch.arange(S - L, S), keys=torch.arange(S))
    found = irpe.linear.attention(q, k, v, rope(), geometry, is_causal=True)
    wanted = quadratic(q, k, v, rope(), geometry)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    ours, theirs = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (found, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_nothing_of_all_pairs_is_built():
    """The largest tensor of a long causal call is of the size of its inputs, not of L * S."""
    from torch.utils._python_dispatch import TorchDispatchMode

    L = 2048
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in [out] if isinstance(x, torch.Tensor))
            return out

    q, k, v = tensors(L, L, B=1)
    with Watch():
        out = irpe.linear.attention(q, k, v, rope(), irpe.Sequence(L), is_causal=True)
        out.sum().backward()
    assert max(sizes) <= 2 * L * max(linear.CHUNK, 6) < 2 * L * L


@pytest.mark.parametrize("spec", ["rope", "rope,layout=half,fraction=0.67"])
def test_at_position_zero_it_is_plain_linear_attention(spec):
    spec = spec.replace("0.67", "0.3333333333333333")
    q, k, v = tensors()
    nowhere = irpe.Sequence(9, positions=torch.zeros(9, dtype=torch.int64))
    found = irpe.linear.attention(q, k, v, rope(spec), nowhere)
    torch.testing.assert_close(found, irpe.linear.attention(q, k, v), rtol=1e-12, atol=1e-12)
    fq, fk = linear.elu_features(q), linear.elu_features(k)
    weights = fq @ fk.mT
    wanted = weights / weights.sum(-1, keepdim=True) @ v
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def test_the_denominator_does_not_know_positions():
    """Values of one give the sum of weights, rotated over unrotated, which need not be 1."""
    q, k, _ = tensors()
    ones = torch.ones(2, 2, 9, 1, dtype=F64)
    near, far = (
        irpe.linear.attention(q, k, ones, rope(), irpe.Sequence(9, positions=torch.arange(9) * s))
        for s in (1, 3)
    )
    fq, fk = linear.elu_features(q), linear.elu_features(k)
    bottom = fq @ fk.sum(2).unsqueeze(-1)
    for found, step in ((near, 1), (far, 3)):
        where = irpe.Sequence(9, positions=torch.arange(9) * step)
        rq, rk = rope().transform(fq, fk, where)
        torch.testing.assert_close(found * bottom, rq @ rk.sum(2).unsqueeze(-1))
    assert not torch.allclose(near, far) and not torch.allclose(near, torch.ones_like(near))


def test_only_differences_of_positions_count():
    q, k, v = tensors()
    first, second = (
        irpe.linear.attention(
            q, k, v, rope(), irpe.Sequence(9, positions=torch.arange(9) + s), is_causal=True
        )
        for s in (0, 500)
    )
    torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("how", ["whole", "causal", "step"])
@pytest.mark.parametrize(
    "levels", [(0, 0), (-18, -18), (-60, -60), (-200, 0), (0, -200), (-250, -100), (60, -60)]
)
def test_features_below_the_smallest_number(how, levels, monkeypatch):
    """float32 against float64, where exp(-700) is a number; keys differ by up to 40 in level."""
    monkeypatch.setattr(linear, "CHUNK", 4)
    q, k, v = tensors(12, 12)
    q, k = q.detach() + levels[0], k.detach() + levels[1] - torch.randint(0, 40, (2, 2, 12, 1))

    def run(dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        if how != "step":
            out = linear.attention(*inputs, rope(), irpe.Sequence(12), is_causal=how == "causal")
        else:
            state, outs = None, []
            for i in range(12):
                here = irpe.Sequence(1, positions=torch.tensor([i]))
                now = (x[:, :, i : i + 1] for x in inputs)
                out, state = linear.step(*now, state, rope(), here)
                outs.append(out)
            out = torch.cat(outs, 2)
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    wanted = quadratic(q, k, v, rope(), irpe.Sequence(12)) if how != "whole" else None
    for exact, found in zip(run(F64), run(torch.float32), strict=True):
        if wanted is not None and exact.shape == wanted.shape:
            torch.testing.assert_close(exact, wanted, rtol=1e-9, atol=1e-9)
            wanted = None
        # Of the largest: weights below a rounding of it are lost in any sum.
        assert (found - exact).abs().max() <= 2e-4 * exact.abs().max()


@pytest.mark.parametrize("steps", [(1,) * 9, (4, 1, 1, 3), (9,)])
def test_step_by_step_is_the_full_forward(steps):
    q, k, v = tensors()
    wanted = irpe.linear.attention(q, k, v, rope(), irpe.Sequence(9), is_causal=True)
    state, outs, done = None, [], 0
    for step in steps:
        new = slice(done, done + step)
        where = irpe.Sequence(step, positions=torch.arange(done, done + step))
        before = None if state is None else state.top.clone()
        held = state
        parts = (x[:, :, new] for x in (q, k, v))
        out, state = irpe.linear.step(*parts, state, rope(), where)
        assert held is None or torch.equal(held.top, before), "the state given is not changed"
        outs.append(out)
        done += step
    torch.testing.assert_close(torch.cat(outs, 2), wanted, rtol=1e-11, atol=1e-11)
    assert state.top.shape == (2, 2, 6, 5) and state.bottom.shape == (2, 2, 6)


def test_grouped_heads_padding_and_rows_that_see_nothing():
    q, k, v = tensors(7, 5, G=1)
    seen = torch.tensor([[True] * 5, [False, False, True, True, True]])
    for causal in (False, True):
        geometry = irpe.Sequence(7, keys=torch.arange(5))
        found = irpe.linear.attention(q, k, v, rope(), geometry, is_causal=causal, seen=seen)
        for b, first in ((0, 0), (1, 2)):
            part = irpe.Sequence(7, keys=torch.arange(first, 5))
            one = [x[b : b + 1] for x in (q, k[:, :, first:], v[:, :, first:])]
            wanted = irpe.linear.attention(*one, rope(), part, is_causal=causal)
            torch.testing.assert_close(found[b : b + 1], wanted, rtol=1e-11, atol=1e-11)
    assert (found[:, :, :2] == 0).all() and (found[1, :, :4] == 0).all()
    grads = torch.autograd.grad(found.square().sum(), (q, k, v))
    assert all(torch.isfinite(g).all() for g in grads) and (grads[0][:, :, :2] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_low_precision_sums_in_float32(causal):
    q, k, v = (x.detach().bfloat16() for x in tensors(300, 300))
    wanted = irpe.linear.attention(
        q.double(), k.double(), v.double(), rope(), irpe.Sequence(300), is_causal=causal
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = irpe.linear.attention(q, k, v, rope(), irpe.Sequence(300), is_causal=causal)
    assert found.dtype == torch.bfloat16
    assert (found.double() - wanted).abs().max() <= 2**-8 * wanted.abs().max()


def test_features_of_another_width():
    """Random features of width M: the encoding is built for M."""
    q, k, v = tensors()
    matrix = torch.randn(6, 10, dtype=F64)
    features = lambda x: (x @ matrix).relu() + 0.1  # noqa: E731
    module = irpe.build("rope", dim=20, num_heads=2)["rope"]
    found = irpe.linear.attention(q, k, v, module, irpe.Sequence(9), features=features)
    fq, fk = features(q), features(k)
    rq, rk = module.transform(fq, fk, irpe.Sequence(9))
    wanted = (rq @ rk.mT @ v) / (fq @ fk.mT).sum(-1, keepdim=True)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def test_compiled():
    q, k, v = tensors(70, 70)
    module = rope()

    def call(q, k, v):
        return irpe.linear.attention(q, k, v, module, irpe.Sequence(70), is_causal=True)

    found = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(found, call(q, k, v), rtol=1e-11, atol=1e-11)


def refuses(call, *parts):
    with pytest.raises(irpe.IrpeError) as caught:
        call()
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_what_it_refuses():
    q, k, v = tensors()
    call = irpe.linear.attention
    refuses(lambda: call(q[0], k, v), "[B, H, L, D]")
    refuses(lambda: call(q, k[..., :4], v), "[2, 2, 9, 4]")
    refuses(lambda: call(q, k[:, :0], v[:, :0]), "0 key heads")
    refuses(lambda: call(q, k, v, rope()), "geometry=None")
    refuses(lambda: call(q, k, v, "rope", irpe.Sequence(9)), "'rope'", "irpe.build")
    refuses(lambda: call(q, k, v, rope(), irpe.Sequence(8)), "8 queries", "L=9")
    alibi = irpe.build("alibi", dim=12, num_heads=2, causal=True)["alibi"]
    refuses(lambda: call(q, k, v, alibi, irpe.Sequence(9)), "alibi", "does not rotate")
    shaw = irpe.build("shaw", dim=12, num_heads=2, dtype=F64)["shaw"]
    refuses(lambda: call(q, k, v, shaw, irpe.Sequence(9)), "shaw", "does not rotate")
    refuses(lambda: call(q, k, v, seen=torch.ones(2, 8).bool()), "[2, 8]")
    refuses(lambda: call(q, k, v, seen=torch.ones(2, 9)), "bool")
    refuses(lambda: irpe.linear.step(q, k[:, :, :3], v[:, :, :3]), "3 and 9")
    _, state = irpe.linear.step(q, k, v)
    refuses(lambda: irpe.linear.step(q[:1], k[:1], v[:1], state), "[2, 2, 6, 5]", "[1, 2, 6, 5]")
