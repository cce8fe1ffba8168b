"""The GPU form of ``irpe.lookup`` against loops; without a GPU in Triton's interpreter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fused import DEVICE, DTYPES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles.lookup import gathered, summed
from oracles.precision import assert_as_good

import irpe
from irpe.backends import reference
from irpe.backends.triton import lookup as operators

ROOT = Path(__file__).parents[1]
ID_DTYPES = [torch.int64, torch.int32, torch.int16, torch.uint8]
# name -> a tensor of the same numbers with other strides
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last axis outside": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "one for all samples": lambda x: x[:1].expand(x.shape),
    "one number": lambda x: x.flatten()[0].expand(x.shape),
}


@pytest.fixture
def everywhere(monkeypatch):
    """The operators are what ``irpe.lookup`` chooses, on a CPU too."""
    monkeypatch.setattr(operators, "DEVICES", ("cuda", "cpu"))


def make_ids(L, S, N, batch=None, dtype=torch.int64):
    ids = torch.randint(N, (L, S) if batch is None else (batch, L, S)).to(dtype)
    if ids.numel() > 1:  # both ends are met
        ids.view(-1)[0], ids.view(-1)[-1] = N - 1, 0
    return ids.to(DEVICE)


def check(x, ids, launches, layout="contiguous"):
    """Forward, gradient, and the gradient of the gradient; g with the given strides."""
    launches.clear()
    x = x.detach().requires_grad_()
    y = operators.lookup(x, ids)
    assert y.dtype == x.dtype and torch.equal(y.cpu(), gathered(x.cpu(), ids.cpu()))
    g = LAYOUTS[layout](torch.randn(y.shape, device=DEVICE).to(x.dtype)).requires_grad_()
    (found,) = torch.autograd.grad(y, x, g, create_graph=True)
    (plain,) = torch.autograd.grad(reference.lookup(x, ids.long()), x, g)
    truth = summed(g.detach().cpu(), ids.cpu(), x.shape[-1])
    size = summed(g.detach().abs().cpu(), ids.cpu(), x.shape[-1]).max()
    assert found.dtype == x.dtype and found.shape == x.shape
    assert_as_good(found.detach().cpu(), plain.cpu(), truth, "gradient", size)
    v = torch.randn(x.shape, device=DEVICE).to(x.dtype)
    (second,) = torch.autograd.grad(found, g, v)
    assert torch.equal(second.cpu(), gathered(v.cpu(), ids.cpu()))
    assert launches == ["lookup", "lookup_backward", "lookup"]


SHAPES = {  # B, H, L, S, N, and whether samples have ids of their own
    "one of each": (1, 1, 1, 1, 1, False),
    "L != S": (2, 3, 7, 9, 50, True),
    "several tiles of keys and buckets": (1, 2, 2, 150, 141, False),
    "several tiles of pairs": (2, 1, 36, 36, 5, False),
    "several blocks of rows": (23, 3, 2, 5, 49, False),
    "several blocks of heads": (2, 17, 2, 5, 20, True),
    "one key": (2, 2, 6, 1, 17, True),
    "one query": (2, 2, 1, 40, 33, True),
}


@pytest.mark.cases(4)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, dtype, launches):
    B, H, L, S, N, own = SHAPES[name]
    ids = make_ids(L, S, N, B if own else None)
    check(torch.randn(B, H, L, N, device=DEVICE).to(dtype), ids, launches)


@pytest.mark.parametrize("n", [0, 15, 16, 63, 64, 127, 128, 140])
def test_one_bucket_for_all_keys(n, launches):
    """First and last ones of tiles of buckets, of which all but one are passed over."""
    ids = torch.full((1, 70), n, device=DEVICE)
    check(torch.randn(1, 2, 1, 141, device=DEVICE), ids, launches)


@pytest.mark.parametrize("dtype", ID_DTYPES)
def test_dtypes_of_ids(dtype, launches):
    """Each is read as it is; 200 is more than an int8 holds."""
    check(torch.randn(2, 2, 3, 200, device=DEVICE), make_ids(3, 20, 200, 2, dtype), launches)
    check(torch.randn(2, 2, 3, 200, device=DEVICE), make_ids(3, 20, 200, 1, dtype), launches)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_calls(data, launches):
    draw = data.draw
    B, H, L = (draw(st.integers(1, n)) for n in (3, 4, 5))
    S, N = draw(st.integers(1, 90)), draw(st.integers(1, 150))
    torch.manual_seed(draw(st.integers(0, 99)))
    ids = make_ids(L, S, N, draw(st.sampled_from([None, 1, B])), draw(st.sampled_from(ID_DTYPES)))
    if draw(st.booleans()):
        ids = ids.transpose(-2, -1).contiguous().transpose(-2, -1)
    x = torch.randn(B, H, L, N, device=DEVICE).to(draw(st.sampled_from(DTYPES)))
    x = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](x)
    check(x, ids, launches, draw(st.sampled_from(sorted(LAYOUTS))))


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
@pytest.mark.parametrize("own", [False, True])
def test_nothing_to_look_up(shape, own, launches):
    B, H, L, S = shape
    x = torch.randn(B, H, L, 5, device=DEVICE, requires_grad=True)
    ids = torch.zeros((B, L, S) if own else (L, S), dtype=torch.long, device=DEVICE)
    y = operators.lookup(x, ids)
    assert y.shape == (B, H, L, S)
    y.sum().backward()
    assert x.grad.shape == x.shape and (x.grad == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_copied(layout, monkeypatch):
    """The kernels get the very tensors, whatever their strides."""
    seen = []
    start = operators._start
    monkeypatch.setattr(
        operators,
        "_start",
        lambda name, *a, **given: seen.append(given) or start(name, *a, **given),
    )
    x = LAYOUTS[layout](torch.randn(2, 3, 4, 5, device=DEVICE))
    ids = make_ids(6, 4, 5).T
    g = LAYOUTS[layout](torch.randn(2, 3, 4, 6, device=DEVICE))
    operators.lookup(x, ids)
    operators.lookup_backward(g, ids, 5)
    assert [s["ids"].data_ptr() for s in seen] == [ids.data_ptr()] * 2
    assert seen[0]["x"].data_ptr() == x.data_ptr() and seen[0]["x"].stride() == x.stride()
    assert seen[1]["g"].data_ptr() == g.data_ptr() and seen[1]["g"].stride() == g.stride()


@pytest.mark.parametrize("axis", range(4))
def test_offsets_past_32_bits(axis):
    """A stride of 31 bits, met twice; the memory between is never touched."""
    shape, far = [3, 3, 3, 3], 2**30
    steps = [3**n for n in range(4)]
    steps[axis] = far
    memory = torch.empty(2 * far + 81, dtype=torch.float16, device=DEVICE)
    x = memory.as_strided(shape, steps)
    x.copy_(torch.randn(shape))
    ids = torch.tensor([[2, 0, 1], [0, 1, 2], [1, 2, 0]], device=DEVICE)
    assert torch.equal(operators.lookup(x, ids).cpu(), gathered(x.cpu(), ids.cpu()))
    found = operators.lookup_backward(x, ids, 3)
    assert torch.equal(found.cpu().double(), summed(x.cpu(), ids.cpu(), 3))


@pytest.mark.skipif(DEVICE != "cuda", reason="4 GiB of results are too many for the interpreter")
def test_more_results_than_32_bits_count():
    L = S = 46400
    x = torch.randn(1, 1, L, 4, device=DEVICE, dtype=torch.float16, requires_grad=True)
    ids = torch.randint(4, (L, S), dtype=torch.uint8, device=DEVICE)
    y = operators.lookup(x, ids)
    for i in (0, L // 2, L - 1):
        assert torch.equal(y[0, 0, i], x[0, 0, i][ids[i].long()])
    (found,) = torch.autograd.grad(y, x, torch.full_like(y, 2.0**-12))
    for i in (0, L // 2, L - 1):
        counts = torch.bincount(ids[i].long(), minlength=4)
        assert torch.equal(found[0, 0, i], (counts * 2.0**-12).half())


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_gathered(dtype):
    x = torch.randn(1, 2, 3, 7, device=DEVICE).to(dtype)
    x[..., 2], x[..., 4] = torch.inf, torch.nan
    ids = make_ids(3, 30, 7)
    y, wanted = operators.lookup(x, ids), reference.lookup(x, ids)
    torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)
    assert y.isnan().any() and y.isinf().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_the_same_in_every_run(dtype):
    ids = make_ids(3, 130, 20)
    g = torch.randn(2, 9, 3, 130, device=DEVICE).to(dtype)
    first = operators.lookup_backward(g, ids, 20)
    assert all(torch.equal(first, operators.lookup_backward(g, ids, 20)) for _ in range(3))
    # Neither do they depend on what else is in the batch.
    assert torch.equal(first[1:], operators.lookup_backward(g[1:], ids, 20))


def test_sums_are_rounded_once():
    """Of 2901 ones: not after every key, nor after every tile of them, in float16 itself."""
    g = torch.ones(1, 1, 1, 3 * 2901, device=DEVICE, dtype=torch.float16)
    ids = (torch.arange(g.shape[-1], device=DEVICE) % 3).short()[None]
    assert operators.lookup_backward(g, ids, 3).flatten().tolist() == [2900.0] * 3


def calls():
    """Arguments for both operators: x, g, ids, N."""
    for own in (False, True):
        ids = make_ids(3, 6, 7, 2 if own else None, torch.int32)
        x = torch.randn(2, 2, 3, 7, device=DEVICE, requires_grad=True)
        yield x, torch.randn(2, 2, 3, 6, device=DEVICE, requires_grad=True), ids, 7


def test_opcheck():
    for x, g, ids, size in calls():
        torch.library.opcheck(operators.lookup, (x, ids))
        torch.library.opcheck(operators.lookup_backward, (g, ids, size))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic, everywhere, launches):
    run = torch.compile(irpe.lookup, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for L, S, N in ((3, 4, 7), (5, 6, 20)):
        ids, x = make_ids(L, S, N), torch.randn(2, 2, L, N, device=DEVICE, requires_grad=True)
        y = run(x, ids)
        weight = torch.randn(y.shape, device=DEVICE)
        (found,) = torch.autograd.grad((y * weight).sum(), x)
        assert torch.equal(y.cpu(), gathered(x.cpu(), ids.cpu()))
        truth = summed(weight.cpu(), ids.cpu(), N)
        torch.testing.assert_close(found.cpu().double(), truth, rtol=1e-5, atol=1e-5)
    assert launches == ["lookup", "lookup_backward"] * 2


class Model(torch.nn.Module):
    def forward(self, x, ids):
        return irpe.lookup(x, ids)


def test_exports_and_traces_as_plain_operations(everywhere, launches):
    x, ids = torch.randn(2, 2, 3, 7, device=DEVICE), make_ids(3, 4, 7)
    program = torch.export.export(Model(), (x, ids))
    traced = torch.jit.trace(Model(), (x, ids), check_trace=False)
    assert "gather" in str(program.graph) and "gather" in str(traced.inlined_graph)
    assert "irpe" not in str(program.graph) and "irpe::" not in str(traced.inlined_graph)
    assert launches == []
    for made in (program.module(), traced):
        assert torch.equal(made(x, ids), operators.lookup(x, ids))


def test_transforms_take_plain_operations(everywhere, launches):
    x, ids = torch.randn(3, 2, 2, 3, 7, device=DEVICE), make_ids(3, 4, 7)
    mapped = torch.vmap(irpe.lookup, (0, None))(x, ids)
    grad = torch.func.grad(lambda z: irpe.lookup(z, ids).square().sum())(x[0])
    _, along = torch.func.jvp(lambda z: irpe.lookup(z, ids), (x[0],), (x[1],))
    assert launches == []
    assert torch.equal(mapped[2], operators.lookup(x[2], ids))
    assert torch.equal(along, operators.lookup(x[1], ids))
    wanted = summed(2 * operators.lookup(x[0], ids).cpu(), ids.cpu(), 7)
    torch.testing.assert_close(grad.cpu().double(), wanted, rtol=1e-5, atol=1e-5)


def test_autocast_casts_nothing(everywhere, launches):
    x = torch.randn(2, 2, 3, 7, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, torch.float16):
        y = irpe.lookup(x, make_ids(3, 4, 7))
        y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.float32
    assert launches == ["lookup", "lookup_backward"]


def test_choice(launches):
    """The kernel on a GPU, torch's gather on a CPU, interpreter or not."""
    irpe.lookup(torch.randn(2, 2, 3, 7, device=DEVICE), make_ids(3, 4, 7))
    assert launches == (["lookup"] if DEVICE == "cuda" else [])


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.int64, torch.int8, torch.bool, torch.complex64, torch.bfloat16],
)
def test_other_dtypes_take_the_reference(dtype, everywhere, launches):
    x, ids = (4 * torch.randn(2, 2, 3, 7)).to(dtype).to(DEVICE), make_ids(3, 4, 7)
    y = irpe.lookup(x, ids)
    assert y.dtype == dtype and torch.equal(y.cpu(), gathered(x.cpu(), ids.cpu()))
    fused = dtype == torch.bfloat16 and DEVICE == "cuda"
    assert launches == (["lookup"] if fused else [])


WRONG = [
    ((3, 4), (1, 2), 7, "ids[1, 2] is 7,"),
    ((3, 4), (2, 3), -1, "ids[2, 3] is -1,"),
    ((2, 3, 4), (1, 0, 2), 1000, "ids[1, 0, 2] is 1000,"),
]


@pytest.mark.parametrize(("shape", "place", "value", "says"), WRONG)
@pytest.mark.parametrize("fused", [False, True])
def test_debug_mode(shape, place, value, says, fused, monkeypatch, request):
    if fused:
        request.getfixturevalue("everywhere")
    ids = torch.zeros(shape, dtype=torch.int16, device=DEVICE)
    x = torch.randn(2, 2, 3, 7, device=DEVICE)
    monkeypatch.setenv("IRPE_DEBUG", "1")
    assert torch.equal(irpe.lookup(x, ids)[..., 0], x[..., 0])
    ids[place] = value
    ids[(*(n - 1 for n in shape[:-1]), -1)] = value  # a later one is not the one named
    with pytest.raises(irpe.IrpeError) as caught:
        irpe.lookup(x, ids)
    assert says in str(caught.value) and "7" in str(caught.value)


def test_debug_mode_in_compiled_code(monkeypatch, everywhere):
    run = torch.compile(irpe.lookup, fullgraph=True, backend="aot_eager")
    monkeypatch.setenv("IRPE_DEBUG", "1")
    ids, x = make_ids(3, 4, 7), torch.randn(2, 2, 3, 7, device=DEVICE)
    run(x, ids)
    ids[1, 1] = 9
    with pytest.raises(irpe.IrpeError, match=r"ids\[1, 1\] is 9"):
        run(x, ids)


@pytest.mark.skipif(DEVICE == "cuda", reason="there the result is undefined")
def test_without_debug_mode_torch_refuses(monkeypatch):
    monkeypatch.delenv("IRPE_DEBUG", raising=False)
    ids = torch.full((3, 4), 7)
    with pytest.raises((IndexError, RuntimeError)) as caught:
        irpe.lookup(torch.randn(2, 2, 3, 7), ids)
    assert not isinstance(caught.value, irpe.IrpeError)


@pytest.mark.full
def test_compiles_for_a_gpu_without_spills(tmp_path):
    command = [sys.executable, "benchmarks/variants.py", "--sample", "--mode", "lookup"]
    command += ["--name", str(tmp_path / "variants")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "variants.json").read_text())["rows"]
    found = {(row["kernel"], row["arch"]) for row in rows}
    assert found == {(k, a) for k in ("lookup", "lookup_backward") for a in (80, 86, 90, 100, 120)}
    assert all(row["spills"] == 0 and row["registers"] > 0 for row in rows)
