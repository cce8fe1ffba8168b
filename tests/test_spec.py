"""Specs as strings: there and back, and nothing but IrpeError for what is none."""

import copy
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import irpe

POSITIVE = st.floats(1e-3, 1e4, allow_nan=False, exclude_min=True)
ON = ("q", "k", "v", "qk", "qv", "kv", "qkv")


@st.composite
def specs(draw):
    mode = draw(st.sampled_from(["bias", "ctx"]))
    fields = {
        "ratio": draw(st.one_of(POSITIVE, st.integers(1, 40))),
        "method": draw(st.sampled_from(["euc", "quant", "rank", "cross", "product"])),
        "mode": mode,
        "shared": draw(st.booleans()),
        "on": draw(st.sampled_from([on for on in ON if mode == "ctx" or "v" not in on])),
        "index": draw(st.sampled_from(["piecewise", "clip"])),
    }
    for name in ("alpha", "beta", "gamma"):
        fields[name] = draw(st.one_of(st.none(), POSITIVE, st.integers(1, 99)))
    try:
        return irpe.RPE(**fields)
    except irpe.IrpeError:  # coefficients that do not go together
        return irpe.RPE(**{**fields, "ratio": 2.0, "alpha": None, "beta": None, "gamma": None})


@settings(max_examples=300, deadline=None)
@given(specs())
def test_there_and_back(spec):
    text = str(spec)
    assert irpe.parse(text) == spec
    assert str(irpe.parse(text)) == text
    assert irpe.parse(spec) is spec
    assert pickle.loads(pickle.dumps(spec)) == spec == copy.deepcopy(spec)
    assert hash(irpe.parse(text)) == hash(spec)


@pytest.mark.parametrize(
    "text",
    [
        "rpe-2.0-product-ctx-1-k",
        "rpe-1.9-product-ctx-1-qkv",
        "rpe-20.0-euc-ctx-1-k",
        "rpe-33.0-quant-ctx-1-k",
        "rpe-20.0-cross-bias-0-qk",
        "rpe-5.0-rank-ctx-0-v",
        "rpe-2.0-product-ctx-1-k,index=clip,beta=4",
        "rpe-2.0-product-ctx-1-k,alpha=2,beta=5,gamma=12.5",
    ],
)
def test_canonical_strings_stay(text):
    assert str(irpe.parse(text)) == text


def test_what_a_string_says():
    spec = irpe.parse("rpe-2.5-cross-bias-0-qk,index=clip,beta=4")
    assert spec == irpe.RPE(
        ratio=2.5, method="cross", mode="bias", shared=False, on="qk", index="clip", beta=4
    )
    assert (spec.alpha, spec.gamma) == (None, None)
    assert irpe.parse("rpe-2-product-ctx-1-k") == irpe.parse("rpe-2.0-product-ctx-1-k")
    assert irpe.parse("rpe-2.0-euclidean-contextual-1-k") == irpe.parse("rpe-2.0-euc-ctx-1-k")
    first = irpe.parse("rpe-2.0-product-ctx-1-k,beta=5,alpha=1.5")
    assert first == irpe.parse("rpe-2.0-product-ctx-1-k,alpha=1.5,beta=5")
    with pytest.raises(AttributeError):
        spec.ratio = 3.0


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 22), st.characters(), st.sampled_from(["replace", "insert", "delete"]))
def test_one_typo(place, character, how):
    text = "rpe-2.0-product-ctx-1-k"
    rest = text[place + (how != "insert") :]
    typo = text[:place] + (character if how != "delete" else "") + rest
    try:
        spec = irpe.parse(typo)
    except irpe.IrpeError:
        return
    assert irpe.parse(str(spec)) == spec
    # What still parses differs in the ratio, the shared flag or the projection, as typed.
    assert (spec.method, spec.mode) == ("product", "ctx")
