"""One-dimensional and rotary encodings against loops in float64, on every backend."""

import functools

import pytest
import torch
from common import TILES
from oracles import text as plain
from text import F64, modules, oracle, places

import irpe

BACKENDS = ("auto", "reference", "eager", *TILES, "sdpa")
# spec: the places it is tried at, and options: causal, mask, D, H
EVERYWHERE = ("whole", "gaps", "own", "prefix", "cached", "cached prefix")
CASES = [
    *(("shaw,clip=3", where, {}) for where in EVERYWHERE),
    ("shaw,clip=3,on=kv,shared=0", "own", {}),
    ("shaw,clip=3,on=kv", "cached prefix", {"causal": True}),
    ("shaw,clip=16,on=kv", "63", {"D": 60, "H": 1, "causal": True, "mask": "dead"}),
    *((f"huang{n},clip=3", where, {}) for n in (1, 2, 3, 4) for where in ("own", "cached prefix")),
    *((f"huang{n},clip=2,shared=0", "prefix", {"causal": True}) for n in (1, 2, 3, 4)),
    ("huang2,clip=2", "gaps", {"mask": "dead"}),
    ("huang3,clip=2", "gaps", {"mask": "additive"}),
    ("huang4,clip=16", "63", {"D": 60, "H": 1}),
    ("huang3,clip=16", "63", {"D": 60, "H": 1, "causal": True}),
    *(("t5,buckets=8,max=20", where, {}) for where in EVERYWHERE),
    ("t5,buckets=8,max=20", "gaps", {"causal": True}),
    ("t5,buckets=8,max=20", "cached", {"causal": True, "mask": "bool"}),
    ("t5,buckets=8,max=20,bidirectional=1", "own", {"causal": True}),
    ("t5,buckets=32,max=128", "63", {"D": 60, "H": 1, "mask": "dead"}),
    *(("alibi", where, {"H": 3}) for where in (*EVERYWHERE, "grid", "grid no prefix", "fractions")),
    *(("alibi", where, {"causal": True, "H": 3}) for where in EVERYWHERE),
    ("alibi", "own", {"causal": True, "mask": "dead"}),
    ("alibi", "cached", {"causal": True, "mask": "additive"}),
    ("alibi", "63", {"D": 60, "H": 2, "causal": True}),
    *(("rope", where, {}) for where in (*EVERYWHERE, "fractions")),
    ("rope,layout=half", "own", {"causal": True}),
    ("rope,fraction=0.5", "prefix", {"D": 8}),
    ("rope,layout=half,fraction=0.25,base=500", "gaps", {"D": 8, "mask": "dead"}),
    ("rope,scaling=linear,factor=4", "whole", {}),
    ("rope,scaling=ntk,factor=4,layout=half", "gaps", {}),
    ("rope,scaling=yarn,factor=4,original=2000,base=100", "prefix", {"D": 16}),
    ("rope", "63", {"D": 60, "H": 1, "causal": True}),
    ("rope-axial", "grid", {"D": 8}),
    ("rope-axial,order=xy,layout=half", "grid no prefix", {"D": 8}),
    ("rope-mixed", "grid", {"D": 8}),
    ("rope-mixed,layout=half", "grid no prefix", {"D": 8}),
]


def make_mask(kind, B, H, L, S):
    if kind is None:
        return None
    mask = torch.rand(B, H, L, S) > 0.4
    if kind == "dead":
        mask[:, :, 1] = False
    else:
        mask[..., -1] = True
    if kind == "additive":
        return torch.randn(mask.shape, dtype=F64).masked_fill(~mask, float("-inf"))
    return mask


@functools.cache
def solved(number):
    """A case: what to call, and what the loops say."""
    torch.manual_seed(number)
    spec, where, options = CASES[number]
    H, D, causal = options.get("H", 2), options.get("D", 6), options.get("causal", False)
    geometry, queries, keys = places(where)
    L, S = len(queries[0]), len(keys[0])
    B = 1 if where == "63" else 2
    prefix = max(geometry.prefix, geometry.key_prefix)
    made = modules(spec, H, D, prefix, causal)
    (module,) = made.values()
    q = torch.randn(B, H, L, D, dtype=F64, requires_grad=True)
    k = torch.randn(B, H, S, D, dtype=F64, requires_grad=True)
    v = torch.randn(B, H, S, 5, dtype=F64, requires_grad=True)
    if getattr(module, "table_v", None) is not None:
        v = torch.randn(B, H, S, D, dtype=F64, requires_grad=True)
    mask = make_mask(options.get("mask"), B, H, L, S)
    logit, value = oracle(spec, module, q, k, queries, keys, causal)
    out = plain.attention(q, k, v, logit, value, mask, causal)
    w = torch.randn_like(out)
    inputs = [q, k, v, *module.parameters()]
    grads = torch.autograd.grad((out * w).sum(), inputs)
    return module, geometry, inputs, {"mask": mask, "is_causal": causal}, w, out.detach(), grads


@pytest.mark.cases(30)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=["-".join([c[0], c[1], *c[2]]) for c in CASES]
)
def test_against_loops(number, backend):
    module, geometry, inputs, given, w, truth, truth_grads = solved(number)
    q, k, v = inputs[:3]
    scale = q.shape[-1] ** -0.5
    terms = module.terms(geometry)
    q, k = module.transform(q, k, geometry)

    def call():
        return irpe.attention(q, k, v, terms, **given, scale=scale, backend=backend)

    refused = {"sdpa": {"value", "gain", "channels"}}
    kinds = {term.kind for term in terms} & refused.get(backend, set())
    if kinds:
        with pytest.raises(irpe.IrpeError, match=f"{backend}.*{kinds.pop()}.*reference"):
            call()
        return
    out = call()
    torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-10)
    grads = torch.autograd.grad((out * w).sum(), inputs)
    for found, wanted in zip(grads, truth_grads, strict=True):
        assert wanted.abs().max() > 1e-6
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


def test_every_encoding_is_tried():
    from irpe.encodings import SPECS as NAMES

    tried = {case[0].partition(",")[0] for case in CASES}
    elsewhere = {"rpe", "cpb", "decomposed", "lookhere", "t5-axes", "sinusoidal", "learned", "pia"}
    assert tried == set(NAMES) - elsewhere


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_causal_attention_in_blocks_of_queries(rows, monkeypatch):
    """What eager does with long causal calls, on short ones: all of the loops' causal cases."""
    import test_attention as images

    from irpe.backends.eager import tile

    monkeypatch.setattr(tile, "CAUSAL_ROWS", rows)
    for number, (_, _, options) in enumerate(CASES):
        if options.get("causal"):
            test_against_loops(number, "eager")
    for name, (_, _, options) in images.CASES.items():
        if options.get("causal"):
            images.test_against_loops(name, "eager")


def test_causal_blocks_drop_out_and_differentiate_twice(monkeypatch):
    from irpe.backends.eager import tile

    monkeypatch.setattr(tile, "CAUSAL_ROWS", 2)
    (module,) = modules("shaw,clip=2,on=kv", 2, 4, False).values()
    terms = module.terms(irpe.Sequence(6))
    q, k, v = (torch.randn(1, 2, 6, 4, dtype=F64, requires_grad=True) for _ in range(3))

    def call(*inputs):
        torch.manual_seed(4)
        given = {"is_causal": True, "dropout_p": 0.3, "backend": "eager"}
        return irpe.attention(*inputs[:3], terms, **given)

    inputs = (q, k, v, *module.parameters())
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)
    many = [x.detach().expand(3000, -1, -1, -1) for x in (q, k, v)]
    out = irpe.attention(*many, terms, is_causal=True, dropout_p=0.3, backend="eager")
    wanted = irpe.attention(q, k, v, terms, is_causal=True, backend="reference")[0]
    spread = out.std(0) / 3000**0.5
    assert ((out.mean(0) - wanted).abs() < 5 * spread + 1e-9).all()
