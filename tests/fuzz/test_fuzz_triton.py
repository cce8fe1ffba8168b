"""Kernels of the triton backend against the reference, by random calls.

Without a GPU they run in Triton's interpreter. All memory that they are given holds NaN before.
"""

import pytest
import test_attention as cases
import torch
from fused import DEVICE, DTYPES, compare, expected, outcome, tabled
from fuzz_inputs import COUNT, examples
from hypothesis import given
from hypothesis import strategies as st

import irpe
from irpe.backends.triton import strips

pytest.importorskip("triton")


@st.composite
def geometries(draw, whole, heads):
    """A grid; of other calls also a part of one, a sequence, or positions of each sample."""
    prefix = draw(st.sampled_from([0, 0, 1, 1, 5, 17]))
    # The interpreter is slow: a call takes seconds for each head of 48 tokens.
    most = draw(st.sampled_from([*[16, 30, 48] * 19, 96, 180, 561])) if COUNT else 48
    most = most if heads == 1 else min(most, 20)
    sides = draw(st.tuples(st.integers(1, 33), st.integers(1, 17)))
    if sides[0] * sides[1] > most:
        sides = sides[0], max(1, most // sides[0])
    sides = sides if draw(st.booleans()) else sides[::-1]
    grid = irpe.Grid(*sides, prefix=prefix)
    kind = "whole" if whole else draw(st.sampled_from(["whole", "part", "samples", "other"]))
    size = sides[0] * sides[1]
    if kind == "part":
        return grid.select(torch.randperm(size)[: draw(st.integers(1, size))].sort()[0])
    if kind == "samples":
        return irpe.Geometry(torch.randint(-9, 9, (2, draw(st.integers(1, 40)), 2)), prefix=prefix)
    if kind == "other":
        shape = (draw(st.integers(1, 40)), 2)
        keys = torch.randint(-9, 9, (draw(st.integers(1, 50)), 2))
        return irpe.Geometry(torch.randint(-9, 9, shape), keys, prefix=prefix, key_prefix=prefix)
    return grid


@st.composite
def calls(draw, whole):
    methods = ["product", "cross"] + ([] if whole else ["euc", "quant"])
    mode = draw(st.sampled_from(["ctx", "ctx", "bias"]))
    on = draw(st.sampled_from(["q", "k", "qk"] + (["v", "qkv", "kv"] if mode == "ctx" else [])))
    ratio = draw(st.sampled_from([1.0, 1.9, 2.0, 3.0]))
    B = draw(st.sampled_from([1, 1, 2]))
    H, G = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (2, 1), (3, 1), (4, 2)]))
    D = draw(st.one_of(st.integers(1, 40), st.sampled_from([1, 64, 96, 128] if COUNT else [1, 64])))
    geometry = draw(geometries(whole, B * H))
    L, S = geometry.query_length, geometry.key_length
    B = geometry.batch or B
    torch.manual_seed(draw(st.integers(0, 10**6)))
    prefix = max(geometry.prefix, geometry.key_prefix)
    method, shared = draw(st.sampled_from(methods)), draw(st.integers(0, 1))
    modules = irpe.build_rpe(
        f"rpe-{ratio}-{method}-{mode}-{shared}-{on}", head_dim=D, num_heads=H, prefix=prefix
    )
    for parameter in (p for m in modules if m for p in m.parameters()):
        torch.nn.init.normal_(parameter, std=draw(st.sampled_from([0.0, 0.3, 1.0])))
    terms = sum((m.to(DEVICE).terms(geometry) for m in modules if m), ())
    qkv = [torch.randn(B, h, n, D) for h, n in ((H, L), (G, S), (G, S))]
    if draw(st.booleans()):  # tokens first, as a projection has them
        qkv = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]
    mask = draw(st.sampled_from([None, None, "bool", "additive", "padding"]))
    options = {
        "mask": None if mask is None else cases.make_mask(mask, B, H, L, S),
        "is_causal": not whole and draw(st.booleans()),
        "scale": draw(st.sampled_from([None, 0.3])),
    }
    return terms, qkv, options, draw(st.booleans())


@pytest.mark.parametrize("whole", [True, False])
def test_calls(whole, launches, monkeypatch):
    if whole:
        monkeypatch.setattr(strips, "WASTE", float("inf"))

    @examples(3, parts=2)
    @given(data=st.data())
    def check(data):
        terms, qkv, options, deterministic = data.draw(calls(whole))
        dtype = torch.float16 if whole else data.draw(st.sampled_from(DTYPES))
        launches.clear()
        torch.use_deterministic_algorithms(deterministic)
        try:
            compare(qkv, terms, dtype, **options)
        finally:
            torch.use_deterministic_algorithms(False)
        assert launches == expected(terms)

    check()


def test_dropout_is_the_same_in_every_kernel(launches):
    """The derivative of a sum is that of finite differences: one random mask in all passes."""

    @examples(2)
    @given(data=st.data())
    def check(data):
        terms, qkv, options, _ = data.draw(calls(False))
        inputs = [x.to(DEVICE, torch.float32).requires_grad_() for x in qkv]
        held = [t.table.detach().clone().requires_grad_() for t in terms]
        options["mask"] = None if options["mask"] is None else options["mask"].to(DEVICE)

        def run(values):
            torch.manual_seed(3)
            used = [*inputs[:2], values]
            weight = torch.ones_like(values[:, :1]).expand(-1, qkv[0].shape[1], -1, -1)
            weight = weight[:, :, :1].expand(-1, -1, qkv[0].shape[2], -1)
            given = {**options, "dropout_p": 0.3, "backend": "triton"}
            return outcome_of(used, tabled(terms, held), weight, given)

        out, grad = run(inputs[2])
        step = torch.randn_like(inputs[2])
        other, _ = run((inputs[2] + step).detach().requires_grad_())
        # Linear in v: the difference of outputs is the gradient times the step.
        torch.testing.assert_close(other - out, (grad * step).sum(), rtol=1e-2, atol=1e-2)

    def outcome_of(used, terms, weight, given):
        backend = given.pop("backend")
        found = outcome(backend, used, terms, weight, **given)
        return found[0].sum(), found[3]

    check()
