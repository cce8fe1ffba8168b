"""Inputs for the fuzz tests: specs by the grammar, near it and far from it; geometries.

A fast sample, the same each time; or as many new ones a test as the environment says::

    IRPE_FUZZ=5000 pytest -m "" tests/fuzz
"""

import math
import os
import string

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

import irpe

COUNT = int(os.environ.get("IRPE_FUZZ", "0"))


def examples(sample, parts=1):
    """Settings of a test, or of one of its parts, with so many inputs in the fast sample."""
    return settings(
        max_examples=-(-COUNT // parts) or sample,
        derandomize=not COUNT,
        print_blob=bool(COUNT),
        database=None,
        deadline=None,
        # Shrinking a case takes an hour where kernels run in the interpreter.
        phases=[Phase.generate] if COUNT else list(Phase),
        suppress_health_check=list(HealthCheck),
    )


ODD_NUMBERS = (
    *("", "0", "-1", "1e3", "1E-3", "nan", "inf", "-inf", "0x3", "1_000", "+2", " 2", "2.", ".5"),
    *("1,5", "٢", "²", "1e400", "9" * 40, "0.00000001", "1000000", "1000001", "True", "None", "½"),
)
LETTERS = string.ascii_letters + string.digits + "-,=._ +\t\n\0\u00e9\u0662\u200b\U0001f600"


def _spelled(numbers):
    return numbers.map(lambda x: f"{x:.6f}".rstrip("0"))


numbers = st.one_of(
    st.sampled_from(["0.5", "1", "1.9", "2.0", "3", "4.5", "7", "33"]),
    _spelled(st.floats(0.3, 12)),
    st.sampled_from(ODD_NUMBERS),
)
counts = st.one_of(st.integers(1, 12).map(str), st.sampled_from(["64", *ODD_NUMBERS]))
_OPTIONS = {
    "index": st.sampled_from(["piecewise", "clip", "log"]),
    **dict.fromkeys(("alpha", "beta", "gamma", "base", "factor", "span", "fraction"), numbers),
    **dict.fromkeys(("clip", "original", "length", "to", "buckets", "max"), counts),
    "layout": st.sampled_from(["half", "interleaved", "whole"]),
    "scaling": st.sampled_from(["linear", "ntk", "yarn", "log"]),
    "order": st.sampled_from(["yx", "xy", "zz"]),
    "on": st.sampled_from(["k", "kv", "q"]),
    "shared": st.sampled_from(["0", "1", "2"]),
    "bidirectional": st.sampled_from(["0", "1", "yes"]),
    "form": st.sampled_from(["paper", "fairseq", "tensor"]),
    "interpolate": st.sampled_from(["left", "corners", "half_pixel", "right"]),
}
_OWN = {
    "rope": ("layout", "base", "fraction", "scaling", "factor", "original"),
    "rope-axial": ("layout", "base", "order"),
    "rope-mixed": ("layout", "base"),
    "sinusoidal": ("form", "base"),
    "learned": ("length", "interpolate", "to"),
    "shaw": ("clip", "on", "shared"),
    **{f"huang{n}": ("clip", "shared") for n in (1, 2, 3, 4)},
    "t5": ("buckets", "max", "bidirectional"),
    "alibi": ("span",),
    "pia": ("form", "base"),
}


@st.composite
def by_grammar(draw):
    """A string of the grammar, with values that may be out of range."""
    if draw(st.booleans()):
        head = "-".join(
            [
                "rpe",
                draw(numbers),
                draw(st.sampled_from(["euc", "quant", "rank", "cross", "product", "euclidean"])),
                draw(st.sampled_from(["bias", "ctx", "contextual"])),
                draw(st.sampled_from("01")),
                draw(st.sampled_from(["q", "k", "v", "qk", "qv", "kv", "qkv", "vk"])),
            ]
        )
        own = ("index", "alpha", "beta", "gamma")
    else:
        head = draw(st.sampled_from(sorted(_OWN)))
        own = _OWN[head]
    names = draw(st.lists(st.sampled_from(own), max_size=3, unique=True))
    return ",".join([head, *(f"{name}={draw(_OPTIONS[name])}" for name in names)])


@st.composite
def mutated(draw):
    """A string of the grammar after a few edits."""
    text = draw(by_grammar())
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        match draw(st.sampled_from(["insert", "remove", "replace", "again", "option", "case"])):
            case "insert":
                text = text[:at] + draw(st.sampled_from(LETTERS)) + text[at:]
            case "remove":
                text = text[:at] + text[at + 1 :]
            case "replace":
                text = text[:at] + draw(st.sampled_from(LETTERS)) + text[at + 1 :]
            case "again":
                text = text + text[at:]
            case "option":
                name = draw(st.sampled_from(sorted(_OPTIONS)))
                text += f",{name}={draw(_OPTIONS[name])}"
            case "case":
                text = text.swapcase()
    return text


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(max_size=4),
    st.lists(st.integers(), max_size=2),
    st.just(torch.zeros(2)),
    st.just(irpe.Grid(2, 2)),
)
specs = st.one_of(by_grammar(), mutated(), by_grammar(), st.text(max_size=40), anything)


@st.composite
def small_specs(draw, kinds=("rpe", "rpe", "rpe", "shaw", "huang", "t5", "alibi", "rope")):
    """A valid spec whose tables are small, for any of the encodings in attention."""
    half = draw(st.sampled_from(["half", "interleaved"]))
    shared = draw(st.sampled_from("01"))
    clip = draw(st.integers(1, 5))
    ratio = draw(st.sampled_from(["0.5", "0.9", "1", "1.9", "2.5", "3.3"]))
    match draw(st.sampled_from(kinds)):
        case "rpe":
            method = draw(st.sampled_from(["euc", "quant", "rank", "cross", "product"]))
            mode = draw(st.sampled_from(["bias", "ctx"]))
            on = draw(st.sampled_from(["q", "k", "qk", *(("v", "qkv") if mode == "ctx" else ())]))
            index = draw(st.sampled_from(["", f",index=clip,beta={clip}", f",gamma={9 + clip}"]))
            return f"rpe-{ratio}-{method}-{mode}-{shared}-{on}{index}"
        case "shaw":
            return f"shaw,clip={clip},on={draw(st.sampled_from(['k', 'kv']))},shared={shared}"
        case "huang":
            return f"huang{draw(st.integers(1, 4))},clip={clip},shared={shared}"
        case "t5":
            bidirectional = draw(st.sampled_from(["", ",bidirectional=0", ",bidirectional=1"]))
            return f"t5,buckets={4 * clip},max={4 * clip + draw(st.integers(1, 20))}{bidirectional}"
        case "alibi":
            return "alibi"
    return draw(
        st.sampled_from(
            [
                f"rope,layout={half}",
                f"rope,fraction=0.5,base={10 + clip}",
                f"rope,scaling=linear,factor={ratio if float(ratio) >= 1 else 2}",
                f"rope-axial,layout={half},order={draw(st.sampled_from(['xy', 'yx']))}",
                f"rope-mixed,layout={half}",
            ]
        )
    )


# --- geometries -----------------------------------------------------------------------------------


def mostly(good, bad):
    """One of the good inputs seven times out of eight."""
    return st.integers(0, 7).flatmap(lambda n: bad if n == 7 else good)


sizes = mostly(
    st.integers(1, 6), st.one_of(st.integers(-2, 0), st.sampled_from([10**30, 2**63]), anything)
)
prefixes = mostly(st.integers(0, 3), st.one_of(st.integers(-2, -1), anything))
DTYPES = (
    *(torch.int64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.float32, torch.float64, torch.float16, torch.complex64, torch.uint16, torch.uint64),
)


@st.composite
def positions(draw, axes=2):
    """Positions of any shape and type; most of them fit."""
    fitting = st.one_of(
        st.tuples(st.integers(1, 5), st.just(axes)),
        st.tuples(st.integers(1, 2), st.integers(1, 5), st.just(axes)),
    )
    shape = draw(mostly(fitting, st.lists(st.integers(0, 3), max_size=4).map(tuple)))
    dtype = draw(mostly(st.sampled_from(DTYPES[:5]), st.sampled_from(DTYPES[5:])))
    most = draw(st.sampled_from([3, 40, 120]))
    signed = dtype.is_signed or dtype.is_complex
    number = st.integers(-most if signed else 0, most)
    count = math.prod(shape)
    values = draw(st.lists(number, min_size=count, max_size=count))
    tensor = torch.tensor(values, dtype=torch.int64).reshape(shape).to(dtype)
    if dtype.is_floating_point and count and draw(st.booleans()):
        tensor.view(-1)[0] = draw(st.sampled_from([float("nan"), float("inf"), 0.5]))
    return tensor


@st.composite
def geometries(draw):
    """How to make a geometry: a function, its arguments by position and by name."""
    match draw(st.sampled_from(["grid", "given", "select", "sequence", "text", "geometry"])):
        case "grid":
            return irpe.Grid, (draw(sizes), draw(sizes)), {"prefix": draw(prefixes)}
        case "given":
            given = {"prefix": draw(prefixes), "positions": draw(mostly(positions(), anything))}
            return irpe.Grid, (draw(sizes), draw(sizes)), given
        case "select":
            shapes = mostly(st.sampled_from([(3,), (2, 3), (0,)]), st.sampled_from([(), (1, 2, 2)]))
            shape, dtype = draw(shapes), draw(mostly(st.just(torch.int64), st.sampled_from(DTYPES)))
            numbers = [draw(st.integers(0, 5)) for _ in range(math.prod(shape))]
            chosen = torch.tensor(numbers, dtype=torch.int64).reshape(shape).to(dtype)
            chosen = draw(mostly(st.just(chosen), anything))
            return (lambda *a, **k: irpe.Grid(*a, **k).select(chosen)), (3, 2), {"prefix": 1}
        case "sequence":
            given = {"prefix": draw(prefixes), "key_prefix": draw(prefixes)}
            return irpe.Sequence, (draw(sizes),), given
        case "text":
            query, key = draw(positions(axes=1)), draw(positions(axes=1))
            flat = draw(mostly(st.just(True), st.just(False)))
            where = [p.squeeze(-1) if flat and p.dim() else p for p in (query, key)]
            length = draw(mostly(st.just(where[0].shape[-1] if where[0].dim() else 1), sizes))
            given = {"positions": draw(mostly(st.just(where[0]), st.sampled_from([None, "0"])))}
            given["keys"] = draw(mostly(st.sampled_from([where[1], None]), st.just([1])))
            return irpe.Sequence, (length,), {**given, "prefix": draw(prefixes)}
    axes = draw(st.sampled_from([1, 2, 2, 3]))
    given = {"prefix": draw(prefixes), "key_prefix": draw(prefixes)}
    return (
        irpe.Geometry,
        (draw(positions(axes)), draw(st.one_of(st.none(), positions(axes)))),
        given,
    )
