"""The choice of a backend: a pure function of a call."""

import dataclasses

import pytest
import torch

import irpe
from irpe.backends import BACKENDS, choose

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SHAPES = {"bias": "N", "slope": "1", "query": "DN", "key": "DN", "value": "NE", "channels": "DN"}


@dataclasses.dataclass(frozen=True)
class Zero:
    """One bucket."""

    size: int = 1

    def __call__(self, offsets):
        return torch.zeros_like(offsets[..., 0])


def make(*kinds, dtype=torch.float16, dim=64, length=197, mask=None, device=CUDA, **given):
    """A call whose tensors have no values; float16, as Triton's interpreter has no bfloat16."""
    geometry = irpe.Sequence(length - 1, prefix=1)
    buckets = irpe.BucketIds(Zero(), geometry)
    sizes = {"N": 2, "1": 1, "D": dim, "E": dim}
    q = torch.empty(2, 6, length, dim, dtype=dtype, device="meta")
    terms = tuple(
        irpe.Term(kind, q.new_empty(1, *(sizes[a] for a in SHAPES.get(kind, "N"))), buckets)
        for kind in kinds
    )
    return irpe.Call(q, q, q, terms, mask, False, 0.0, 1.0, device, **given)


@pytest.mark.parametrize(
    ("backend", "kinds", "given"),
    [
        ("triton", ["query"], {}),
        ("triton", ["value", "bias"], {}),
        ("triton", ["query"], {"compiled": True}),
        ("sdpa", [], {}),
        ("sdpa", ["query"], {"dtype": torch.float32}),
        ("sdpa", ["query"], {"dim": 256}),
        ("sdpa", ["query"], {"length": 2**16}),
        ("sdpa", ["query"], {"mask": torch.zeros(1, 197, requires_grad=True)}),
        ("sdpa", ["slope"], {}),
        ("eager", ["value"], {"dtype": torch.float32}),
        ("eager", ["value"], {"dtype": torch.float64}),
        ("eager", ["channels", "query"], {}),
        ("eager", ["gain", "query"], {}),
        ("reference", ["gain"], {"compiled": True}),
        ("reference", ["query"], {"traced": True}),
        ("eager", ["query"], {"device": CPU}),
        ("eager", ["gain"], {"device": CPU}),
        ("eager", ["channels"], {"device": CPU}),
        ("reference", ["query"], {"device": CPU, "compiled": True}),
    ],
)
def test_choice(backend, kinds, given):
    call = make(*kinds, **given)
    chosen, reasons = choose(call)
    assert chosen.name == backend
    assert chosen.unsupported(call) is None
    assert reasons[-1].startswith(f"{backend}: ")


def test_triton_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(irpe.backends.triton, "INSTALLED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    chosen, reasons = choose(make("query"))
    assert chosen.name == "sdpa" and reasons[0] == "not triton: Triton is not installed"


def test_what_was_not_measured_says_so():
    assert "predicted" in choose(make("query"))[1][-1]
    assert "measured" in choose(make("query", device=CPU))[1][-1]


@pytest.mark.parametrize(
    ("kinds", "given", "reason"),
    [
        (["query"], {"traced": True}, "plain operations"),
        (["query"], {"mask": torch.zeros(1, 197, requires_grad=True)}, "gradient to the mask"),
        (["query"], {"dim": 136}, "head dim 136 is more than 128"),
        (["query"], {"dtype": torch.float64}, "not in torch.float64"),
        (["query"], {"length": 2**16}, "2**31"),
        (["slope", "query"], {}, "no slope terms"),
        (["slope", "channels", "gain"], {}, "no channels and gain and slope terms"),
    ],
)
def test_what_triton_cannot_do(kinds, given, reason):
    assert reason in BACKENDS["triton"].unsupported(make(*kinds, **given))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs it")
def test_triton_without_a_gpu_names_the_able(monkeypatch):
    monkeypatch.setattr(irpe.backends.triton, "INTERPRETED", False)
    q = torch.zeros(1, 1, 4, 16)
    with pytest.raises(irpe.IrpeError, match="on cpu.*Use one of reference, eager, sdpa"):
        irpe.attention(q, q, q, backend="triton")


@pytest.fixture
def doubled():
    """A third party's backend for calls with a bias: twice the reference, which a test can see."""
    before = dict(BACKENDS)
    irpe.register_backend(
        "doubled",
        lambda call: 2 * BACKENDS["reference"].attention(call),
        unsupported=lambda call: None if "bias" in call.kinds else "it wants a bias",
        preference=lambda call: (200, "asked for"),
    )
    yield
    BACKENDS.clear()
    BACKENDS.update(before)


def test_a_registered_backend(doubled):
    q = torch.randn(2, 2, 5, 8)
    buckets = irpe.BucketIds(Zero(), irpe.Sequence(5))
    terms = (irpe.Term("bias", torch.zeros(1, 1), buckets),)
    assert irpe.explain(q, q, q, terms).splitlines()[0].startswith("backend doubled: ")
    assert "doubled: asked for" in irpe.explain(q, q, q, terms)
    wanted = irpe.attention(q, q, q, terms, backend="reference")
    assert torch.equal(irpe.attention(q, q, q, terms), 2 * wanted)
    # Without the bias, auto takes the next one and says why; the name itself raises.
    assert "not doubled: it wants a bias" in irpe.explain(q, q, q)
    torch.testing.assert_close(irpe.attention(q, q, q), wanted)
    with pytest.raises(irpe.IrpeError, match="'doubled' cannot compute this call: it wants a bias"):
        irpe.attention(q, q, q, backend="doubled")


@pytest.mark.parametrize("name", ["auto", "no name", "", 3])
def test_names_of_backends(name):
    with pytest.raises(irpe.IrpeError, match="name is an identifier"):
        irpe.register_backend(name, lambda call: call.q)
