"""Specs of one-dimensional and rotary encodings as strings: there and back, or IrpeError."""

import copy
import dataclasses
import pickle
from functools import partial

import pytest
from common import refuses
from hypothesis import given, settings
from hypothesis import strategies as st

import irpe
from irpe.encodings import SPECS as NAMES

CANONICAL = [
    "rope",
    "rope,layout=half",
    "rope,base=500000,fraction=0.25",
    "rope,layout=half,base=500000,fraction=0.5,scaling=yarn,factor=4,original=4096",
    "rope,scaling=linear,factor=2.5",
    "rope,scaling=ntk,factor=8",
    "rope-axial",
    "rope-axial,layout=half,base=50,order=xy",
    "rope-axial,layout=half,coords=max,shift=0.5,jitter=1.35,rescale=2",
    "rope-mixed",
    "rope-mixed,base=12.5",
    "sinusoidal",
    "sinusoidal,form=fairseq,base=100",
    "learned,length=512",
    "learned,length=512,interpolate=left,to=2048",
    "learned,length=64,interpolate=half_pixel,to=100",
    "shaw,clip=64",
    "shaw,clip=3,on=kv,shared=0",
    "huang1,clip=64",
    "huang2,clip=8",
    "huang3,clip=1,shared=0",
    "huang4,clip=64",
    "t5,buckets=32,max=128",
    "t5,buckets=8,max=20,bidirectional=0",
    "t5,buckets=8,max=20,bidirectional=1",
    "alibi",
    "alibi,span=4",
    "pia",
    "pia,form=paper",
    "rope,scaling=longrope,factor=4,original=64,short_factor=1:1.5,long_factor=2:0.5",
    "rope,scaling=llama3,factor=8,original=8192,low_freq_factor=2,high_freq_factor=8",
    "cpb,hidden=512",
    "cpb,form=cr,hidden=128,window=8",
    "decomposed,size=14",
    "decomposed,size=14,width=20",
    "t5-axes,buckets=8,max=20",
    "lookhere",
    "lookhere,fov=180,slope=2.5",
]
VALUES = st.one_of(
    st.sampled_from(["half", "interleaved", "linear", "ntk", "yarn", "left", "corners", "k", "kv"]),
    st.sampled_from(["fairseq", "paper", "xy", "0", "1", "64", "128", "512", "2048", "0.5", "4"]),
    st.integers(0, 4096).map(str),
)


@pytest.mark.parametrize("text", CANONICAL)
def test_there_and_back(text):
    spec = irpe.parse(text)
    assert str(spec) == text and irpe.parse(str(spec)) == spec
    assert irpe.parse(spec) is spec and hash(irpe.parse(text)) == hash(spec)
    assert pickle.loads(pickle.dumps(spec)) == spec == copy.deepcopy(spec)
    for field in dataclasses.fields(spec):
        with pytest.raises(AttributeError):
            setattr(spec, field.name, 3)
    assert repr(spec).startswith(type(spec).__name__)


def test_every_name_has_a_canonical_string():
    assert {text.partition(",")[0] for text in CANONICAL} == {*NAMES} - {"rpe"}


def test_defaults_are_left_out_unless_they_size_a_table():
    assert str(irpe.parse("rope,layout=interleaved,base=10000.0,fraction=1")) == "rope"
    assert str(irpe.parse("shaw")) == "shaw,clip=64" == str(irpe.parse("shaw,on=k,shared=1"))
    assert str(irpe.parse("t5")) == "t5,buckets=32,max=128"
    assert str(irpe.parse("learned")) == "learned,length=512"
    assert str(irpe.parse("huang2")) == "huang2,clip=64"
    assert irpe.parse("rope,factor=4,scaling=linear") == irpe.parse("rope,scaling=linear,factor=4")


def test_what_a_spec_says_of_itself():
    names = [name for name in NAMES if name != "rpe"]
    by_axes = {name: irpe.parse(name).axes for name in names}
    images = {"rope-axial", "rope-mixed", "cpb", "decomposed", "lookhere", "t5-axes"}
    assert {n for n, axes in by_axes.items() if 2 in axes} == {*images, "alibi"}
    assert {n for n, axes in by_axes.items() if 1 not in axes} == images
    assert {n for n in names if irpe.parse(n).at_input} == {"sinusoidal", "learned"}
    neutral = {n for n in names if irpe.parse(n).neutral}
    assert neutral == {"decomposed", "shaw", "t5", "t5-axes", *(f"huang{n}" for n in range(1, 5))}
    image = irpe.parse("rpe-1.9-product-ctx-1-k")
    assert isinstance(image, irpe.Spec) and (image.axes, image.at_input, image.neutral) == (
        (2, 3),
        False,
        True,
    )


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(sorted(NAMES)), st.data())
def test_any_options_parse_or_are_an_irpe_error(name, data):
    known = [field.name for field in NAMES[name].options(name)]
    chosen = data.draw(st.lists(st.sampled_from([*known, "method", "x"]), max_size=4))
    text = ",".join([name, *(f"{option}={data.draw(VALUES)}" for option in chosen)])
    try:
        spec = irpe.parse(text)
    except irpe.IrpeError as error:
        assert repr(text) in str(error)
    else:
        assert irpe.parse(str(spec)) == spec and str(irpe.parse(str(spec))) == str(spec)


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.just([]),
    st.just({}), st.binary(max_size=2), st.just(object()), st.complex_numbers(), st.just(10**400),
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.sampled_from([*dict.fromkeys(NAMES.values())]), st.data())
def test_any_field_value_is_taken_or_is_an_irpe_error(kind, data):
    names = [field.name for field in dataclasses.fields(kind)]
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
    try:
        spec = kind(**{name: data.draw(ANYTHING) for name in chosen})
    except irpe.IrpeError:
        return
    assert irpe.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rop", ("'rop'", "rope-axial", "shaw", "rpe-{ratio}")),
        ("Rope", ("'Rope'", "rope")),
        ("rope ", ("'rope '",)),
        ("huang5", ("'huang5'", "huang4")),
        ("huang4,method=2", ("method=2", "clip=")),
        ("rope,layout=Half", ("'Half'", "interleaved, half")),
        ("rope,base=1", ("base=1", "more than 1")),
        ("rope,base=-3", ("-3", "positive")),
        ("rope,fraction=0", ("'0'", "positive")),
        ("rope,fraction=1.5", ("1.5", "at most 1")),
        ("rope,scaling=linear", ("scaling=linear", "factor=None", "factor=4")),
        ("rope,factor=4", ("scaling=None", "factor=4")),
        ("rope,scaling=yarn,factor=4", ("original=None", "original=2048")),
        ("rope,scaling=ntk,factor=4,original=99", ("original=99", "yarn")),
        ("rope,scaling=ntk,factor=0.5", ("0.5", "at least 1")),
        ("rope,layout=half,layout=half", ("layout", "twice")),
        ("rope,layout", ("'layout'", "options are layout=")),
        ("rope-axial,order=yxz", ("'yxz'", "yx, xy")),
        ("rope-axial,fraction=0.5", ("fraction=0.5", "order=")),
        ("learned,length=0", ("length=0", "1 to")),
        ("learned,length=8.5", ("'8.5'", "integer")),
        ("learned,interpolate=left", ("interpolate=left", "to=None", "to=2048")),
        ("learned,length=64,interpolate=left,to=32", ("to=32", "length=64")),
        ("learned,interpolate=right,to=900", ("'right'", "half_pixel")),
        ("shaw,clip=", ("clip=''", "integer")),
        ("shaw,clip=64,on=v", ("'v'", "k, kv")),
        ("shaw,shared=2", ("'2'", "0 or 1")),
        ("t5,buckets=6", ("buckets=6", "multiple of 4")),
        ("t5,buckets=32,max=8", ("max=8", "more than 8")),
        ("t5,max=16,bidirectional=0", ("max=16", "more than 16")),
        ("alibi,span=0", ("'0'", "positive")),
        ("alibi,clip=3", ("clip=3", "span=")),
        ("pia,form=half", ("'half'", "paper, fairseq")),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(text, says):
    refuses(partial(irpe.parse, text), repr(text), *says)
