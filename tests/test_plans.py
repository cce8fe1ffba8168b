"""The triton backend does once what depends on shapes alone, and keeps it for any stream."""

import copy
import pickle
import threading
from dataclasses import dataclass

import pytest
import torch
from fused import DEVICE, leaf

import irpe
from irpe import functional
from irpe.backends import Call, triton
from irpe.backends.triton import launch, passes, plan, strips
from irpe.backends.triton.variants import variant
from irpe.buckets import BucketIds, ClipBuckets
from irpe.buckets.ids import FUNCTIONS, number_of
from irpe.cache import Cache, remembered
from irpe.terms import Term

pytest.importorskip("triton")
SPEC = "rpe-1.9-product-ctx-1-qkv"
DTYPE = torch.float16


def layer(spec=SPEC, **given):
    made = irpe.RPEAttention(32, 2, spec, backend="triton", **given).to(DEVICE)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return made


def call(spec=SPEC, grid=None, **given):
    """A function that computes attention and all gradients."""
    grid = irpe.Grid(3, 4, prefix=1) if grid is None else grid
    modules = irpe.build_rpe(spec, head_dim=16, num_heads=2, prefix=grid.prefix, device=DEVICE)
    modules = [m for m in modules if m is not None]
    for p in (p for m in modules for p in m.parameters()):
        torch.nn.init.normal_(p, std=0.3)
    q, k, v = (leaf(torch.randn(2, 2, grid.query_length, 16), DTYPE) for _ in range(3))

    def run(**more):
        # Geometry and terms are new in every call, as in a model.
        where = irpe.Grid(grid.height, grid.width, grid.prefix) if grid.whole else grid
        terms = sum((m.terms(where) for m in modules), ())
        with torch.autocast(torch.device(DEVICE).type, DTYPE):
            out = irpe.attention(q, k, v, terms, backend="triton", **{**given, **more})
        return [out, *torch.autograd.grad(out.sum(), [q, k, v, *(t.table for t in terms)])]

    return run


@pytest.mark.cases(1)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("case", ["strips", "maps", "given"])
def test_a_call_with_known_shapes_plans_nothing(case, wide, monkeypatch):
    monkeypatch.setattr(strips, "WASTE", float("inf") if case == "strips" else 0.0)
    irpe.clear_cache()
    grid = irpe.Grid(3, 4, prefix=1)
    grid = grid.select(torch.arange(9).to(DEVICE)) if case == "given" else grid
    run = call(grid=grid, mask=torch.ones(grid.query_length, device=DEVICE) > 0 if wide else None)
    first, _ = run(), run()

    def never(*args, **given):
        raise AssertionError("planned again")

    for owner, name in (
        (functional, "validated"), (functional, "named"), (plan, "_plan"), (plan, "_padded_ids"),
        (strips, "strips"), (strips, "places"), (launch, "Launcher"), (launch, "Step"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, never)
    if case != "given":  # positions may be others in the next call
        monkeypatch.setattr(triton, "encode", never)
    for a, b in zip(first, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    with pytest.raises(AssertionError, match="planned again"):
        run(scale=0.5)  # a known call is one of equal arguments


def test_a_known_call_validates_what_changes():
    run = call()
    run(), run()
    with pytest.raises(irpe.IrpeError, match="does not broadcast"):
        run(mask=torch.ones(5, device=DEVICE) > 0)
    with pytest.raises(irpe.IrpeError, match="not a probability"):
        run(dropout_p=1.5)
    out = run()
    irpe.register_backend("other", lambda call: call.q)  # what auto picks may be another now
    try:
        assert not functional.KNOWN
    finally:
        del irpe.backends.BACKENDS["other"]
    torch.testing.assert_close(run()[0], out[0])


@pytest.mark.cases(1)
@pytest.mark.parametrize("spec", [SPEC, "rpe-1.9-euc-bias-0-k", "shaw,clip=3,on=kv"])
def test_compiled_code_builds_no_maps(spec, monkeypatch):
    built, graphs = [], []
    for owner, name in ((strips, "strips"), (plan, "_padded_ids")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, real=real: built.append(real) or real(*args))
    irpe.clear_cache()
    text = spec.startswith("shaw")
    made = layer(spec, **({} if text else {"prefix": 1}))

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(made, fullgraph=True, backend=keep)
    x = torch.randn(2, 13, 32, device=DEVICE)
    for _ in range(3):
        # A grid of its own in every call, as in a model.
        compiled(x, irpe.Sequence(13) if text else irpe.Grid(3, 4, prefix=1)).sum().backward()
    nodes = [str(n.target) for graph in graphs for n in graph.graph.nodes]
    if not text:  # its maps are of functions that are made in the call
        assert len(built) == 1 and not [name for name in nodes if "arange" in name]
    assert len(graphs) == 1 and made.qkv.weight.grad.abs().max() > 0


@dataclass(frozen=True)
class Silent:
    """A bucket function whose repr tells nothing."""

    clip: int

    @property
    def size(self):
        return self.clip + 1

    def __call__(self, offsets):
        return offsets.squeeze(-1).abs().clamp(max=self.clip)

    def __repr__(self):
        return "Silent()"


def test_numbers_of_functions():
    one, two = Silent(3), Silent(4)
    assert number_of(one) == number_of(Silent(3)) != number_of(two)
    assert FUNCTIONS[number_of(one)] == one and FUNCTIONS[number_of(two)] == two
    assert 0 <= number_of(ClipBuckets(3)) < 2**62
    made = layer().rpe_k
    assert FUNCTIONS[made.number] == made.function
    # In another process nobody has made the function yet.
    text = pickle.dumps(made)
    del FUNCTIONS[made.number]
    irpe.buckets.ids._NUMBERS.pop(made.function)
    for other in (pickle.loads(text), copy.deepcopy(made)):
        assert other.number == made.number and FUNCTIONS[other.number] == made.function


def test_functions_with_equal_reprs_are_told_apart():
    q = torch.randn(1, 2, 9, 16, device=DEVICE)
    for clip in (3, 4):
        table = torch.randn(1, clip + 1, device=DEVICE)
        terms = (Term("bias", table, BucketIds(Silent(clip), irpe.Sequence(9))),)
        found = irpe.attention(q, q, q, terms, backend="triton")
        wanted = irpe.attention(q, q, q, terms, backend="reference")
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_nothing_is_kept_that_a_capture_made(monkeypatch):
    cache = Cache()
    monkeypatch.setattr(irpe.cache, "capturing", lambda: True)
    assert remembered("key", lambda: 1, cache) == 1 and cache.get("key") is None
    monkeypatch.setattr(irpe.cache, "capturing", lambda: False)
    assert remembered("key", lambda: 2, cache) == 2 and cache.get("key") == 2
    monkeypatch.setattr(irpe.cache, "capturing", lambda: True)
    assert remembered("key", lambda: 3, cache) == 2  # made before the capture


def test_what_is_kept_is_born_on_the_default_stream(monkeypatch):
    synchronized = []

    class Stream:
        def synchronize(self):
            synchronized.append(threading.get_ident())

    monkeypatch.setattr(irpe.cache, "on_side_stream", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: Stream())
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    here, cache = threading.get_ident(), Cache()
    with torch.inference_mode():
        made = remembered("key", lambda: (threading.get_ident(), torch.ones(1)), cache)
    # A thread of its own has the default stream; both streams are waited for.
    assert made[0] != here and synchronized == [here, made[0]] and made[1].is_inference()
    with pytest.raises(ZeroDivisionError):
        remembered("other", lambda: 1 // 0, cache)
    assert remembered("key", threading.get_ident, cache) is made


def sequence_first(length, batch=256, heads=12, dim=64, **made):
    """q of a fused projection whose tokens come first."""
    return torch.empty(length, batch, 3, heads, dim, **made).permute(2, 1, 3, 0, 4)[0]


def test_offsets_of_inputs():
    """(L - 1) * 3 B H D passes 2**31 from L = 3642 on."""
    for length, inside in ((3641, True), (3642, False)):
        q = sequence_first(length, device="meta")
        last = (length - 1) * q.stride(2) + 63
        assert (last < 2**31) == inside == (passes._unit(q) is q)
        assert plan.span(q) == last + 1 and plan.span(passes._unit(q)) < 2**31


def test_inputs_with_large_offsets_are_copied(monkeypatch):
    grid = irpe.Grid(3, 4)
    made = irpe.build_rpe(
        "rpe-1.9-product-ctx-1-k", head_dim=8, num_heads=2, prefix=0, device=DEVICE
    )
    (term,) = made[1].terms(grid)
    q = sequence_first(12, 3, 2, 8, device=DEVICE).normal_().requires_grad_()
    copied, real = [], torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: copied.append(x.shape) or real(x))
    results = []
    for offsets in (2**31, plan.span(q)):
        monkeypatch.setattr(passes, "OFFSETS", offsets)
        copied.clear()
        out = irpe.attention(q, q, q, (term,), backend="triton")
        results += [out, torch.autograd.grad(out.square().sum(), q)[0]]
        assert (q.shape in copied) == (offsets < 2**31)
    assert torch.equal(results[0], results[2])
    torch.testing.assert_close(results[1], results[3])


@pytest.mark.parametrize(
    ("length", "heads", "spec", "said"),
    [
        (30_000, 2, "rpe-1.9-product-ctx-1-k", None),
        (40_000, 2, "rpe-1.9-product-ctx-1-k", "bucket ids"),
        (20_000, 2, "rpe-1.9-cross-ctx-1-qkv", "bucket ids"),  # six maps at most
        (40_000, 2, None, None),
        (40_000, 900, None, "57600 channels"),
        (50_000, 2, None, "pairs of a query"),
    ],
)
def test_calls_with_large_offsets_are_refused(length, heads, spec, said):
    q = torch.empty(1, heads, length, 64, device="meta", dtype=torch.bfloat16)
    terms = ()
    if spec is not None:
        modules = irpe.build_rpe(spec, head_dim=64, num_heads=heads, prefix=0)
        terms = sum((m.terms(irpe.Grid(length // 100, 100)) for m in modules if m), ())
    call = Call(q, q, q, terms, None, False, 0.0, 1.0, torch.device("cuda"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "INTERPRETED", False)
        found = triton._refused(call)
    assert found is None if said is None else said in found


def test_small_gpus_get_small_tiles():
    """sm_86 and sm_120 have 100 KiB of shared memory, and multiply as sm_80 does."""
    options = {"MAPS": 1, "SIDE": 8, "COLUMNS": 1, "ROWS": 1, "MASS": 1, "SHARED": False}
    options |= {"MASK": "none", "DROPOUT": False, "DETERMINISTIC": False}

    def of(kernel, capability):
        return variant(kernel, torch.bfloat16, 64, options, capability)._replace(maxnreg=None)

    for kernel in ("forward", "row_pass", "column_pass"):
        assert of(kernel, 80) == of(kernel, 86) and of(kernel, 120) == of(kernel, 121)
        hopper, blackwell = of(kernel, 90), of(kernel, 100)
        if kernel == "row_pass":  # they spill with other pieces and orders of loads
            blackwell = blackwell._replace(PIECE=hopper.PIECE, HOIST=hopper.HOIST)
        assert hopper == blackwell
        small, large = (v.BM * v.BN for v in (of(kernel, 120), of(kernel, 90)))
        assert small <= large
