"""The triton backend on terms of text encodings, against the reference in float64."""

import pytest
import test_text as cases
import torch
from fused import DEVICE, DTYPES, compare, expected, leaf

import irpe

REFUSED = {"slope", "channels", "gain"}
TABLED = [
    number
    for number, (spec, where, _) in enumerate(cases.CASES)
    if spec.partition(",")[0] in ("shaw", "huang4", "t5") and where != "63"
]


@pytest.mark.cases(1)
@pytest.mark.parametrize("number", TABLED, ids=["-".join(cases.CASES[n][:2]) for n in TABLED])
def test_every_case_of_the_loops(number, launches):
    dtype = DTYPES[number % len(DTYPES)]
    module, geometry, inputs, given, *_ = cases.solved(number)
    terms = module.terms(geometry)
    compare(inputs[:3], terms, dtype, **given)
    assert launches == expected(terms)


@pytest.mark.parametrize("spec", ["shaw,clip=3,on=kv", "huang4,clip=3"])
def test_half_precision_takes_no_text_for_a_grid(spec, launches):
    """There it looks for tables on a whole grid first."""
    module = irpe.build(spec, dim=32, num_heads=2)[spec.partition(",")[0].rstrip("4")]
    for p in module.parameters():
        torch.nn.init.normal_(p)
    terms = module.to(DEVICE).terms(irpe.Sequence(20))
    compare([torch.randn(1, 2, 20, 16) for _ in range(3)], terms, torch.float16)
    assert launches == expected(terms)


@pytest.mark.parametrize("spec", ["alibi", "huang1,clip=3", "huang3,clip=3"])
def test_what_the_kernels_lack_is_refused(spec):
    (module,) = irpe.build(spec, dim=32, num_heads=2, device=DEVICE).values()
    q, k, v = (leaf(torch.randn(1, 2, 9, 16)) for _ in range(3))
    terms = module.terms(irpe.Sequence(9))
    assert {term.kind for term in terms} <= REFUSED
    with pytest.raises(irpe.IrpeError, match="triton.*(slope|channels|gain) terms.*reference"):
        irpe.attention(q, k, v, terms, backend="triton")
    assert "not triton" in irpe.explain(q, k, v, terms) or DEVICE == "cpu"
