"""Attention calls: one that fits equals the loops, gradients too; one that does not: IrpeError."""

import itertools
from collections import Counter

import pytest
import torch
from fuzz_inputs import examples, small_specs
from hypothesis import given
from hypothesis import strategies as st
from oracles import attention as image_loops
from oracles import text as text_loops
from test_attention import build
from text import modules, oracle

import irpe

F64 = torch.float64
REFUSED = {"sdpa": {"value", "gain", "channels"}}


@st.composite
def places(draw, axes, plain):
    """A geometry, positions of queries and of keys for two samples; ``plain``: in order, whole."""
    prefix = draw(st.integers(0, 2))
    if plain or draw(st.booleans()):
        sides = [draw(st.integers(1, 3)) for _ in range(axes)]
        if axes == 1:
            sides[0] += draw(st.integers(0, 5))
            made, flat = irpe.Sequence(sides[0], prefix), list(range(sides[0]))
        else:
            made = (irpe.Grid if axes == 2 else irpe.Volume)(*sides, prefix=prefix)
            flat = list(itertools.product(*map(range, sides)))
        where = [[None] * prefix + flat] * 2
        return made, where, where

    def drawn():
        length, own = draw(st.integers(1, 5)), draw(st.booleans())
        number = st.integers(-20, 20)
        row = st.lists(st.lists(number, min_size=axes, max_size=axes), min_size=length)
        rows = row.map(lambda r: r[:length])
        samples = [draw(rows) for _ in range(1 + own)]
        tensor = torch.tensor(samples if own else samples[0]).view(-1, length, axes)
        return tensor if own else tensor[0], (samples if own else samples * 2)

    query, queries = drawn()
    key, keys, key_prefix = None, queries, prefix
    if draw(st.booleans()):
        (key, keys), key_prefix = drawn(), draw(st.integers(0, 2))
    made = irpe.Geometry(query, key, prefix=prefix, key_prefix=key_prefix)

    def listed(samples, count):
        one = axes == 1
        return [[None] * count + [p[0] if one else tuple(p) for p in s] for s in samples]

    return made, listed(queries, prefix), listed(keys, key_prefix)


@st.composite
def masks(draw, B, H, L, S):
    """A mask, with rows that see nothing among the rest, that broadcasts to [B, H, L, S]."""
    kind = draw(st.sampled_from([None, "bool", "added"]))
    if kind is None:
        return None
    shape = [draw(st.sampled_from([1, n])) for n in (B, H, L, S)]
    mask = torch.rand(shape) > draw(st.sampled_from([0.2, 0.6]))
    if kind == "added":
        return torch.randn(shape, dtype=F64).masked_fill(~mask, float("-inf"))
    return mask


@st.composite
def calls(draw):
    """A call that fits, and what the loops need to compute it."""
    spec = irpe.parse(draw(small_specs()))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    image, H, D = isinstance(spec, irpe.RPE), draw(st.integers(1, 3)), draw(st.sampled_from([4, 8]))
    causal = draw(st.booleans())
    # Causal ALiBi needs positions that increase.
    plain = str(spec).startswith("alibi") and causal
    volumes = image and spec.method != "rank"
    axes = 1 if plain else draw(st.sampled_from([n for n in spec.axes if n < 3 or volumes]))
    geometry, queries, keys = draw(places(axes, plain))
    L, S = len(queries[0]), len(keys[0])
    prefix = max(geometry.prefix, geometry.key_prefix)
    if image:
        made, encodings = build(spec, D, H, prefix, axes)
    else:
        made, encodings = list(modules(spec, H, D, prefix, causal).values()), None
    G = draw(st.sampled_from([1, H])) if image else H
    shapes = (H, L, D), (G, S, D), (G, S, D)
    q, k, v = (torch.randn(2, *shape, dtype=F64, requires_grad=True) for shape in shapes)
    given = {
        "mask": draw(masks(2, H, L, S)),
        "is_causal": causal,
        "scale": D**-0.5,
        "backend": draw(st.sampled_from(["auto", "reference", "eager", "sdpa"])),
    }
    return spec, made, geometry, (q, k, v), given, (encodings, queries, keys)


def attend(made, geometry, qkv, given):
    """The call, by the encodings' hooks."""
    q, k, v = qkv
    for module in made:
        q, k = module.transform(q, k, geometry)
    terms = sum((module.terms(geometry) for module in made), ())
    return irpe.attention(q, k, v, terms, **given)


def by_loops(spec, made, qkv, given, places):
    q, k, v = qkv
    encodings, queries, keys = places
    mask = given["mask"]
    full = None if mask is None else mask.expand(2, q.shape[1], q.shape[2], k.shape[2])
    causal, scale = given["is_causal"], given["scale"]
    if encodings is not None:
        return image_loops.attention(q, k, v, encodings, queries, keys, full, causal, scale)
    logit, value = oracle(spec, made[0], q, k, queries, keys, causal)
    return text_loops.attention(q, k, v, logit, value, full, causal)


@pytest.mark.full
def test_calls_that_fit():
    outcomes = Counter()

    @examples(120)
    @given(calls())
    def check(call):
        spec, made, geometry, qkv, options, where = call
        kinds = {t.kind for m in made for t in m.terms(geometry)}
        if kinds & REFUSED.get(options["backend"], set()):
            with pytest.raises(irpe.IrpeError):
                attend(made, geometry, qkv, options)
            return
        out, wanted = (
            attend(made, geometry, qkv, options),
            by_loops(spec, made, qkv, options, where),
        )
        torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-9)
        if wanted.requires_grad:
            inputs = [*qkv, *(p for m in made for p in m.parameters())]
            w = torch.randn_like(out)
            found, wanted = (
                torch.autograd.grad(
                    (x * w).sum(), inputs, allow_unused=True, materialize_grads=True
                )
                for x in (out, wanted)
            )
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
        outcomes[str(spec).partition(",")[0][:3]] += 1

    check()
    assert len(outcomes) == 6, outcomes


def _wrong(draw, qkv, given):
    """The call's tensors, options and terms with one mistake."""
    q, k, v = (x.detach() for x in qkv)
    L, S, more = q.shape[2], k.shape[2], {}
    longer = lambda x, axis: torch.cat((x, x.narrow(axis, 0, 1)), axis)  # noqa: E731
    match draw(st.sampled_from(["shape", "type", "mask", "option", "terms", "object"])):
        case "shape":
            q, k, v = draw(
                st.sampled_from(
                    [
                        (q[0], k, v),
                        (q, k.unsqueeze(0), v),
                        (longer(q, 2), k, v),
                        (q, longer(k, 2), longer(v, 2)),
                        (q, longer(k, 2), v),
                        (q, k, longer(v, 1)),
                        (longer(q, 0), k, v),
                        (longer(q, 3), k, v),
                        (q, k[:, :0], v[:, :0]),
                        (q, *(x[:, :1].expand(-1, q.shape[1] + 1, -1, -1) for x in (k, v))),
                    ]
                )
            )
        case "type":
            other = draw(
                st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.complex128])
            )
            q, k, v = draw(
                st.sampled_from([(q.to(other), k, v), (q, k.to(other), v), (q, k, v.to(other))])
            )
        case "mask":
            more["mask"] = draw(
                st.sampled_from(
                    [torch.ones(L, S + 2), torch.ones(2, 1, 1, L, S), torch.ones(S).long(), [1], 0]
                )
            )
        case "option":
            name, value = draw(
                st.sampled_from(
                    [
                        *(("dropout_p", p) for p in (1.5, -0.1, float("nan"), "half", None)),
                        *(("scale", s) for s in ("1", [1.0], torch.ones(1))),
                        *(("backend", b) for b in ("fast", None, 3, "", ["auto"], "Eager")),
                    ]
                )
            )
            more[name] = value
        case "terms":
            return (q, k, v), given, draw(st.sampled_from([("rpe",), None, "rpe", 3, [None]]))
        case "object":
            made = [q, k, v]
            made[draw(st.integers(0, 2))] = draw(st.sampled_from([None, 1.0, [[1.0]], "q"]))
            q, k, v = made
    return (q, k, v), {**given, **more}, ()


def test_calls_that_do_not_fit():
    @examples(120)
    @given(calls(), st.data())
    def check(call, data):
        _, made, geometry, qkv, options, _ = call
        # The reference computes all that is right, so that what it refuses is wrong.
        qkv, options, terms = _wrong(data.draw, qkv, {**options, "backend": "reference"})
        with pytest.raises(irpe.IrpeError):
            attempt(made, geometry, qkv, options, terms)

    def attempt(made, geometry, qkv, options, terms):
        if terms != ():
            irpe.attention(*qkv, terms, **options)
        irpe.attention(*qkv, sum((m.terms(geometry) for m in made), ()), **options)
        attend(made, geometry, qkv, options)  # rotary ones see tokens before attention does

    check()
