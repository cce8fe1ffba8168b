"""Positions on three axes: the geometry, and every encoding of videos against loops."""

import copy
import functools
import math
import pickle

import pytest
import torch
from common import TILES
from fused import DEVICE, compare, expected
from oracles import attention as truth
from oracles import buckets as plain

import irpe

F64, CPU = torch.float64, torch.device("cpu")
TABLES = (
    "rpe-1.9-product-ctx-1-k",
    "rpe-1.0-product-ctx-0-qkv",
    "rpe-1.9-product-bias-0-qk",
    "rpe-1.9-cross-ctx-0-qkv",
    "rpe-2.0-cross-bias-1-k",
    "rpe-3.0-euc-ctx-0-qkv",
    "rpe-5.0-quant-ctx-1-qk",
    "rpe-2.0-product-ctx-1-k,index=clip,beta=2",
)
LOGS = "t5-axes,buckets=8,max=6"
ROTARY = ("rope-axial", "rope-axial,layout=half,order=xy", "rope-axial,coords=max", "rope-mixed")
SPECS = (*TABLES, *ROTARY, "alibi", LOGS)
H, D = 2, 24
WHERE = {
    "2x3x2": ((2, 3, 2), 0, None),
    "3x1x4+1": ((3, 1, 4), 1, None),
    "1x2x3+5": ((1, 2, 3), 5, None),
    "dropped+1": ((3, 2, 4), 1, [[0, 3, 9, 23], [5, 6, 14, 22]]),
}


def build(spec, axes=3, prefix=0, D=D, dtype=F64):
    torch.manual_seed(1)
    made = irpe.build(spec, dim=H * D, num_heads=H, prefix=prefix, axes=axes, dtype=dtype)
    holder = torch.nn.ModuleDict(made)
    for name, p in holder.named_parameters():
        if "frequencies" not in name:
            torch.nn.init.normal_(p)
    return holder


def attend(holder, q, k, v, geometry, backend="auto"):
    encodings = irpe.encodings_of(holder)
    q, k = encodings.transform(q, k, geometry)
    return irpe.attention(q, k, v, encodings.terms(geometry), scale=D**-0.5, backend=backend)


def placed(where):
    """The geometry, and the place of each token of two samples."""
    sides, prefix, kept = WHERE[where]
    whole = plain.volume(*sides)
    geometry = irpe.Volume(*sides, prefix=prefix)
    if kept is None:
        return geometry, [[None] * prefix + whole] * 2
    places = [[None] * prefix + [whole[i] for i in row] for row in kept]
    return geometry.select(torch.tensor(kept)), places


def frequencies(module, h):
    """Radians per step of each axis and plane of a head ``[A][R / 2]``, and the planes' pairs."""
    spec, axes = module.spec, 3
    if str(spec) == "rope-mixed":
        return [module.frequencies[a, h] for a in range(axes)], "interleaved"
    each = D // 6
    rows = []
    for axis in range(axes):
        part = axis if spec.order == "yx" else axes - 1 - axis
        rows.append([0.0] * (3 * each))
        for t in range(each):
            rows[-1][part * each + t] = spec.base ** (-t / each)
    return rows, spec.layout


def turned(module, x, places, sides):
    """x ``[B, H, L, D]`` rotated, token by token and plane by plane."""
    samples = []
    for b, row in enumerate(places):
        heads = []
        for h in range(H):
            found, layout = frequencies(module, h)
            planes, tokens = len(found[0]), []
            for i, place in enumerate(row):
                parts = list(x[b, h, i])
                for t in range(planes if place is not None else 0):
                    at = place
                    if getattr(module.spec, "coords", "patches") == "max":
                        at = [2 * math.pi * (2 * (p + 0.5) / max(sides) - 1) for p in place]
                    angle = torch.as_tensor(
                        sum(p * f[t] for p, f in zip(at, found, strict=True)), dtype=F64
                    )
                    m, n = (t, t + planes) if layout == "half" else (2 * t, 2 * t + 1)
                    first, second = x[b, h, i, m], x[b, h, i, n]
                    parts[m] = first * angle.cos() - second * angle.sin()
                    parts[n] = second * angle.cos() + first * angle.sin()
                tokens.append(torch.stack(parts))
            heads.append(torch.stack(tokens))
        samples.append(torch.stack(heads))
    return torch.stack(samples)


def log_bucket(x):
    """T5's bucket of an offset query - key, for 8 buckets both ways and max=6."""
    far = abs(x)
    if far >= 2:
        far = min(3, 2 + int(math.log(far / 2) / math.log(6 / 2) * 2))
    return far + 4 * (x < 0)


def distances(places):
    def far(i, j):
        return 0.0 if i is None or j is None else math.dist(i, j)

    return torch.tensor([[[far(i, j) for j in row] for i in row] for row in places], dtype=F64)


@functools.cache
def solved(spec, where):
    geometry, places = placed(where)
    L = geometry.query_length
    holder = build(spec, prefix=geometry.prefix)
    q, k, v = (torch.randn(2, H, L, D, dtype=F64, requires_grad=True) for _ in range(3))
    tables, encodings, mask = list(holder.parameters()), [], None
    qr, kr = q, k
    if spec in TABLES:
        parsed = irpe.parse(spec)
        functions = plain.buckets(parsed, 3)
        for name, module in holder.items():
            on = name[-1]
            for table, function in zip(module.parameters(), functions, strict=True):
                encodings.append((f"bias_{on}" if parsed.mode == "bias" else on, table, function))
    elif spec == LOGS:
        for axis, table in enumerate(holder["t5"].table.unbind(0)):
            padded = torch.nn.functional.pad(table, (0, 1))
            encodings.append(("bias_k", padded, lambda *x, axis=axis: log_bucket(x[axis])))
    elif spec == "alibi":
        slopes = torch.tensor([2.0**-4, 2.0**-8], dtype=F64).view(1, H, 1, 1)
        mask = -slopes * distances(places).unsqueeze(1)
    else:
        qr, kr = (turned(holder["rope"], x, places, WHERE[where][0]) for x in (q, k))
    out = truth.attention(qr, kr, v, encodings, places, places, mask, scale=D**-0.5)
    w = torch.randn_like(out)
    grads = torch.autograd.grad((out * w).sum(), [q, k, v, *tables], allow_unused=True)
    return holder, geometry, (q, k, v), w, out.detach(), grads


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("spec", SPECS)
def test_reference_against_loops(spec, where):
    against_loops(spec, where, "reference")


@pytest.mark.cases(9)
@pytest.mark.parametrize("backend", ["eager", *TILES, "sdpa", "auto"])
@pytest.mark.parametrize("where", ["3x1x4+1", "dropped+1"])
@pytest.mark.parametrize("spec", SPECS)
def test_against_loops(spec, where, backend):
    against_loops(spec, where, backend)


def against_loops(spec, where, backend):
    if backend == "sdpa" and "v" in spec.rpartition("-")[2]:
        pytest.skip("sdpa has no value terms")
    holder, geometry, qkv, w, wanted, grads = solved(spec, where)
    out = attend(holder, *qkv, geometry, backend)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    found = torch.autograd.grad((out * w).sum(), [*qkv, *holder.parameters()])
    for ours, theirs in zip(found, grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.cases(1)
@pytest.mark.parametrize("spec", [s for s in TABLES if "ctx" in s])
def test_kernels_take_the_map_path(spec, launches):
    geometry, _ = placed("3x1x4+1")
    holder = build(spec, prefix=1, D=16, dtype=torch.float32).to(DEVICE)
    terms = irpe.encodings_of(holder).terms(geometry)
    qkv = [torch.randn(2, H, geometry.query_length, 16) for _ in range(3)]
    compare(qkv, terms, torch.float16)
    assert launches == expected(terms)


def test_tables_have_the_sizes_of_three_axes():
    def shapes(spec):
        return {n: tuple(p.shape) for n, p in build(spec, prefix=1).named_parameters()}

    assert shapes("rpe-1.9-product-ctx-1-k") == {"rpe_k.lookup_table_weight": (1, D, 7**3 + 1)}
    assert shapes("rpe-1.9-cross-bias-0-k") == {
        f"rpe_k.{part}.lookup_table_bias": (H, 8) for part in ("rp_frames", "rp_rows", "rp_cols")
    }
    assert shapes("rpe-1.9-euc-ctx-1-k") == {"rpe_k.lookup_table_weight": (1, D, 8)}
    assert shapes("rope-mixed") == {"rope.frequencies": (3, H, D // 2)}
    ids, size = irpe.bucket_ids("rpe-1.9-product-ctx-1-k", irpe.Volume(5, 5, 6))
    assert size == 343 and ids.unique().numel() == 343
    parts, size = irpe.bucket_ids("rpe-1.9-cross-ctx-1-k", irpe.Volume(2, 3, 4))
    assert len(parts) == 3 and size == 7


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("prefix", [0, 2])
def test_one_frame_is_a_grid(spec, prefix):
    """With the tables of a grid where offsets of frames are 0; the frames' own table is fresh."""
    volume = build(spec, prefix=prefix)
    axial = spec.startswith("rope-axial")
    # Frames have a third of the channels; rows and columns are those of a grid of the others.
    width = 2 * D // 3 if axial else D
    grid = build(spec, axes=2, prefix=prefix, D=width)
    theirs = dict(volume.named_parameters())
    with torch.no_grad():
        for name, p in theirs.items():
            if "rp_frames" in name:
                p.zero_()
            elif spec == LOGS:
                p[0].zero_()
        for name, p in grid.named_parameters():
            other = theirs[name]
            if "frequencies" in name or spec == LOGS:
                other = other[1:]
            elif "product" in spec:
                axis = 1 if name.startswith("rpe_v") or "bias" in name else 2
                side = p.shape[axis] - (prefix > 0)
                bound = (math.isqrt(side) - 1) // 2
                keep = torch.arange(bound * side, (bound + 1) * side)
                keep = torch.cat((keep, torch.tensor([other.shape[axis] - 1])[: prefix > 0]))
                other = other.index_select(axis, keep)
            p.copy_(other)
    length = prefix + 6
    q, k, v = (torch.randn(2, H, length, D, dtype=F64) for _ in range(3))
    if not axial:
        ours = attend(volume, q, k, v, irpe.Volume(1, 2, 3, prefix=prefix))
        wanted = attend(grid, q, k, v, irpe.Grid(2, 3, prefix=prefix))
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
        return
    planes = torch.arange(D // 2)
    planes = planes[: -D // 6] if "xy" in spec else planes[D // 6 :]  # frames come first, or last
    half = "half" in spec
    keep = torch.cat((planes, planes + D // 2)) if half else torch.stack(
        (2 * planes, 2 * planes + 1), -1).flatten()  # fmt: skip
    (turned3, _), (turned2, _) = (
        module["rope"].transform(x, x, geometry)
        for module, x, geometry in (
            (volume, q, irpe.Volume(1, 2, 3, prefix=prefix)),
            (grid, q[..., keep], irpe.Grid(2, 3, prefix=prefix)),
        )
    )
    torch.testing.assert_close(turned3[..., keep], turned2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shift", [1, -3, 10**7])
@pytest.mark.parametrize("spec", SPECS)
def test_only_offsets_count(spec, shift):
    holder, places = build(spec), torch.tensor([[0, 0, 0], [2, 1, 4], [1, 4, 2], [5, 0, 3]])
    q, k, v = (torch.randn(1, H, 4, D, dtype=F64) for _ in range(3))
    near, far = (
        attend(holder, q, k, v, irpe.Volume(6, 6, 6, positions=places + n)) for n in (0, shift)
    )
    if "rope" not in spec:
        assert torch.equal(near, far)
    else:
        torch.testing.assert_close(near, far, rtol=0, atol=1e-6 if shift == 10**7 else 1e-11)


@pytest.mark.cases(1)
@pytest.mark.parametrize("spec", ["rope-axial", "rope-mixed", "alibi", LOGS, TABLES[0], TABLES[3]])
def test_layers_compile_export_and_low_precision(spec):
    spec = spec.replace("-v", "-k")
    layer = irpe.RPEAttention(36, 2, spec, prefix=1, axes=3)
    for name, p in layer.named_parameters():
        if "table" in name:
            torch.nn.init.normal_(p, std=0.3)
    x, volume = torch.randn(2, 13, 36), irpe.Volume(2, 3, 2, prefix=1)
    wanted = layer(x, volume)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, volume), wanted, rtol=1e-5, atol=1e-5)

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x, irpe.Volume(2, 3, 2, prefix=1))

    exported = torch.export.export(Whole(), (x,)).module()
    torch.testing.assert_close(exported(x), wanted, rtol=1e-5, atol=1e-5)
    low = layer.to(torch.bfloat16)(x.to(torch.bfloat16), volume)
    assert (low.float() - wanted).abs().max() < 0.1 * wanted.abs().max() + 0.05


def test_gradients_of_learned_frequencies():
    module, volume = build("rope-mixed", D=6)["rope"], irpe.Volume(2, 1, 2, prefix=1)
    x = torch.randn(1, H, 5, 6, dtype=F64, requires_grad=True)

    def call(x, frequencies):
        return torch.func.functional_call(
            module, {"frequencies": frequencies}, (x, x, volume), strict=True
        )

    module.forward = module.transform
    assert torch.autograd.gradcheck(call, (x, module.frequencies.detach().requires_grad_()))


def test_mixed_frequencies_start_in_three_directions():
    module = irpe.build("rope-mixed", dim=24 * 4, num_heads=4, axes=3)["rope"]
    found = module.frequencies.detach().double()
    each = [found[:, :, n * 4 : n * 4 + 1] for n in range(3)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (each[a] * each[b]).sum(0).abs().max() < 1e-6
    wanted = 10.0 ** (-torch.arange(4, dtype=F64) / 4)
    torch.testing.assert_close(
        found.norm(dim=0), wanted.repeat(3).expand(4, 12), rtol=1e-5, atol=1e-6
    )


def test_the_geometry():
    volume = irpe.Volume(2, 3, 4, prefix=2)
    query, key = volume.positions(CPU)
    assert query.tolist() == [list(p) for p in plain.volume(2, 3, 4)] == key.tolist()
    assert (volume.axes, volume.query_length, volume.prefix, volume.whole) == (3, 26, 2, True)
    assert (volume.frames, volume.height, volume.width) == (2, 3, 4) == volume.sides
    assert repr(volume) == "Volume(2, 3, 4, prefix=2)"
    same = irpe.Volume(2, 3, 4, prefix=2)
    assert volume == same and hash(volume) == hash(same) and volume != irpe.Volume(2, 4, 3, 2)
    assert irpe.Volume(1, 3, 4) != irpe.Grid(3, 4)
    for copied in (copy.deepcopy(volume), pickle.loads(pickle.dumps(volume))):
        assert copied == volume
    kept = torch.tensor([[0, 13, 23], [4, 5, 12]])
    some = volume.select(kept)
    assert some.positions(CPU)[0].tolist() == [
        [[0, 0, 0], [1, 0, 1], [1, 2, 3]],
        [[0, 1, 0], [0, 1, 1], [1, 0, 0]],
    ]
    assert repr(some) == "Volume(2, 3, 4, prefix=2, positions=[2, 3, 3])" and some.batch == 2
    with pytest.raises(irpe.IrpeError, match="whole volume; this one is a selection"):
        some.select(kept)
    with pytest.raises(irpe.IrpeError, match="frames=0 is not an integer of at least 1"):
        irpe.Volume(0, 1, 1)
    with pytest.raises(irpe.IrpeError, match=r"volume are \(frame, row, column\), not 2"):
        irpe.Volume(2, 2, 2, positions=torch.zeros(3, 2, dtype=torch.long))


@pytest.mark.parametrize(
    "spec", ["rpe-1.9-product-ctx-1-k", "rpe-1.9-cross-bias-1-k", "rope-mixed", LOGS]
)
def test_other_axes_than_built_for_raise(spec):
    layer = irpe.RPEAttention(40, 2, spec)
    with pytest.raises(irpe.IrpeError, match="built for 2 axes.*axes=3"):
        layer(torch.randn(1, 8, 40), irpe.Volume(2, 2, 2))
    with pytest.raises(irpe.IrpeError, match="method rank is for 2 axes only"):
        irpe.build("rpe-5.0-rank-ctx-1-k", dim=36, num_heads=2, axes=3)
    with pytest.raises(irpe.IrpeError, match="axes=4.*2 or 3"):
        irpe.build(spec, dim=36, num_heads=2, axes=4)
    for name in ("cpb", "decomposed", "lookhere"):
        with pytest.raises(irpe.IrpeError, match="not"):
            irpe.RPEAttention(36, 2, name)(torch.randn(1, 8, 36), irpe.Volume(2, 2, 2))
