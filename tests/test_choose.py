"""The choice of a backend is a pure function of a call's facts."""

import dataclasses

import pytest
import torch

import irpe
from irpe.backends.choose import Facts, choose, obstacle

GPU = Facts(
    kinds=frozenset({"query"}),
    gain_maps=0,
    device="cuda",
    dtype=torch.float16,  # Triton's interpreter, which tests run in, has no bfloat16
    head_dim=64,
    pairs=197 * 197,
    compiled=False,
    traced=False,
    mask_grad=False,
    no_triton=None,
)


@pytest.mark.parametrize(
    ("backend", "changed"),
    [
        ("triton", {}),
        ("triton", {"kinds": frozenset({"value", "bias"})}),
        ("triton", {"compiled": True}),
        ("sdpa", {"kinds": frozenset()}),
        ("sdpa", {"dtype": torch.float32}),
        ("sdpa", {"no_triton": "Triton is not installed"}),
        ("sdpa", {"head_dim": 256}),
        ("sdpa", {"pairs": 2**31}),
        ("sdpa", {"mask_grad": True}),
        ("eager", {"dtype": torch.float32, "kinds": frozenset({"value"})}),
        ("eager", {"dtype": torch.float64, "kinds": frozenset({"value"})}),
        ("reference", {"traced": True}),
        ("eager", {"device": "cpu", "no_triton": "no GPU"}),
        ("reference", {"device": "cpu", "no_triton": "no GPU", "compiled": True}),
        ("eager", {"device": "cpu", "no_triton": "no GPU", "kinds": frozenset({"gain"})}),
        ("eager", {"device": "cpu", "no_triton": "no GPU", "kinds": frozenset({"channels"})}),
        ("sdpa", {"kinds": frozenset({"slope"})}),
        ("eager", {"kinds": frozenset({"channels", "query"})}),
    ],
)
def test_choice(backend, changed):
    facts = dataclasses.replace(GPU, **changed)
    name, reasons = choose(facts)
    assert name == backend
    assert obstacle(name, facts) is None
    assert reasons[-1].startswith(f"{name}: ")


def test_what_was_not_measured_says_so():
    assert "predicted" in choose(GPU)[1][-1]
    on_cpu = dataclasses.replace(GPU, device="cpu", no_triton="no GPU")
    assert "measured" in choose(on_cpu)[1][-1]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"no_triton": "Triton is not installed"}, "Triton is not installed"),
        ({"traced": True}, "plain operations"),
        ({"mask_grad": True}, "gradient to the mask"),
        ({"head_dim": 136}, "head dim 136 is more than 128"),
        ({"dtype": torch.float64}, "not in torch.float64"),
        ({"pairs": 2**31}, "2**31"),
        ({"gain_maps": 2}, "more than one bucket function"),
        ({"kinds": frozenset({"slope", "query"})}, "no slope terms"),
        ({"kinds": frozenset({"slope", "channels"})}, "no channels and slope terms"),
    ],
)
def test_what_triton_cannot_do(changed, reason):
    assert reason in obstacle("triton", dataclasses.replace(GPU, **changed))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs it")
def test_triton_without_a_gpu_names_the_able(monkeypatch):
    monkeypatch.setattr(irpe.backends.triton, "INTERPRETED", False)
    q = torch.zeros(1, 1, 4, 16)
    with pytest.raises(irpe.IrpeError, match="on cpu.*Able: reference, eager, sdpa"):
        irpe.attention(q, q, q, backend="triton")
