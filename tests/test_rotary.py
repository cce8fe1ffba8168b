"""Rotary embeddings: what must hold whatever the numbers, precision, and frequencies."""

import itertools
import math

import pytest
import torch
from oracles import text as plain
from text import F64, modules, rotation
from torch import nn

import irpe
from irpe.encodings.rotation import rotate

ROPES = ("rope", "rope,layout=half", "rope,fraction=0.5", "rope,layout=half,fraction=0.25,base=99")


def rope(spec="rope", D=8, H=2):
    return irpe.build(spec, dim=H * D, num_heads=H)["rope"]


def at(*positions):
    return irpe.Sequence(len(positions), positions=torch.tensor(positions))


def turned(spec, x, geometry, H=2):
    """x ``[B, H, L, D]`` rotated as queries are."""
    return rope(spec, x.shape[-1], H).transform(x, x, geometry)[0]


def logits(spec, q, k, geometry):
    q, k = rope(spec, q.shape[-1]).transform(q, k, geometry)
    return q @ k.mT


@pytest.mark.parametrize("spec", ROPES)
def test_only_differences_of_positions_count(spec):
    q, k = (torch.randn(2, 2, 9, 16, dtype=F64) for _ in range(2))
    where = torch.tensor([0, 1, 2, 5, 6, 11, 12, 13, 30])
    base = logits(spec, q, k, at(*where.tolist()))
    for shift, allowed in ((1, 1e-11), (1000, 1e-11), (-7, 1e-11), (10**6, 1e-8)):
        moved = logits(spec, q, k, at(*(where + shift).tolist()))
        torch.testing.assert_close(moved, base, rtol=0, atol=allowed)
    low = logits(spec, q.float(), k.float(), at(*(where + 1000).tolist()))
    torch.testing.assert_close(low.double(), base, rtol=0, atol=2e-5)


@pytest.mark.parametrize("spec", ROPES)
def test_a_rotation_is_a_rotation(spec):
    x = torch.randn(1, 2, 5, 16, dtype=F64)
    geometry = at(0, 3, -3, 700, 5)
    y = turned(spec, x, geometry)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-13, atol=0)
    assert torch.equal(y[:, :, 0], x[:, :, 0])
    twice = turned(spec, turned(spec, x, at(2, 3, 10, -5, 8)), at(1, -3, 7, 6, -9))
    torch.testing.assert_close(twice, turned(spec, x, at(3, 0, 17, 1, -1)), rtol=1e-12, atol=1e-12)
    back = turned(spec, y, at(0, -3, 3, -700, -5))
    torch.testing.assert_close(back, x, rtol=1e-12, atol=1e-12)


def test_layouts_are_permutations_of_each_other():
    x = torch.randn(2, 2, 7, 16, dtype=F64)
    order = torch.tensor([*range(0, 16, 2), *range(1, 16, 2)])
    geometry = irpe.Sequence(7)
    interleaved = turned("rope", x, geometry)
    assert torch.equal(turned("rope,layout=half", x[..., order], geometry), interleaved[..., order])
    assert not torch.allclose(turned("rope,layout=half", x, geometry), interleaved)


def test_equals_the_block_diagonal_matrix():
    x = torch.randn(1, 1, 4, 6, dtype=F64)
    y = turned("rope", x, at(0, 1, 5, 30), H=1)
    for i, position in enumerate((0, 1, 5, 30)):
        blocks = []
        for theta in plain.frequencies(6, 10000.0):
            c, s = math.cos(position * theta), math.sin(position * theta)
            blocks.append(torch.tensor([[c, -s], [s, c]], dtype=F64))
        matrix = torch.block_diag(*blocks)
        torch.testing.assert_close(y[0, 0, i], matrix @ x[0, 0, i], rtol=1e-12, atol=1e-12)


@pytest.mark.cases(1)
@pytest.mark.parametrize("spec", ROPES)
def test_gradient_is_the_rotation_back(spec):
    x = torch.randn(1, 2, 5, 16, dtype=F64, requires_grad=True)
    geometry, w = at(0, 3, 4, 8, 9), torch.randn(1, 2, 5, 16, dtype=F64)
    (grad,) = torch.autograd.grad((turned(spec, x, geometry) * w).sum(), x)
    torch.testing.assert_close(grad, turned(spec, w, at(0, -3, -4, -8, -9)))

    def call(x):
        return turned(spec, x, geometry)

    assert torch.autograd.gradcheck(call, x) and torch.autograd.gradgradcheck(call, x)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_learned_angles_have_gradients(layout):
    x = torch.randn(1, 2, 3, 8, dtype=F64, requires_grad=True)
    angle = torch.randn(2, 3, 3, dtype=F64, requires_grad=True)

    def call(x, angle):
        return rotate(x, angle.cos(), angle.sin(), layout)

    assert torch.autograd.gradcheck(call, (x, angle))


@pytest.mark.parametrize("spec", ROPES)
def test_functorch_and_the_two_ways_agree(spec):
    x, geometry = torch.randn(3, 1, 2, 5, 16, dtype=F64), irpe.Sequence(5)
    wanted = torch.stack([turned(spec, one, geometry) for one in x])
    torch.testing.assert_close(torch.vmap(lambda one: turned(spec, one, geometry))(x), wanted)
    _, tangent = torch.func.jvp(lambda one: turned(spec, one, geometry), (x[0],), (x[1],))
    torch.testing.assert_close(tangent, wanted[1])


def ulps(a, b):
    """How many numbers of bfloat16 or float16 lie between two tensors of it."""
    low = torch.finfo(a.dtype).tiny
    ints = [
        torch.where(x.abs() < low, torch.zeros_like(x), x).view(torch.int16).int() for x in (a, b)
    ]
    ints = [torch.where(i < 0, -(i & 0x7FFF), i) for i in ints]
    return (ints[0] - ints[1]).abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", ROPES)
def test_low_precision_is_rounded_once(spec, dtype):
    """Whatever was called before, and whatever .to() did to the module."""
    x = torch.randn(1, 2, 4096, 16).to(dtype)
    first = rope(spec, 16).to(dtype).half()
    geometry = irpe.Sequence(4096)
    low = first.transform(x, x, geometry)[0]
    assert low.dtype == dtype
    high = first.transform(x.float(), x.float(), geometry)[0]
    fresh = turned(spec, x.float(), irpe.Sequence(4096))
    assert torch.equal(high, fresh), "the table does not depend on which call was the first"
    assert ulps(low, high.to(dtype)) <= 1
    truth = turned(spec, x.double(), irpe.Sequence(4096))
    assert ((low.double() - truth).abs() <= torch.finfo(dtype).eps * truth.abs() + 1e-5).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(first.transform(x, x, irpe.Sequence(4096))[0], low)


def test_low_precision_gradients():
    x = torch.randn(1, 2, 300, 16).bfloat16().requires_grad_()
    w = torch.randn(1, 2, 300, 16).bfloat16()
    (grad,) = torch.autograd.grad((turned("rope", x, irpe.Sequence(300)) * w).sum(), x)
    back = turned("rope", w.float(), at(*range(0, -300, -1)))
    assert ulps(grad, back.bfloat16()) <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_positions_in_16_bits_are_refused(dtype):
    """They round: 2049 is 2048 in float16."""
    with pytest.raises(irpe.IrpeError, match=f"{dtype}.*integers or float32"):
        irpe.Sequence(4, positions=torch.arange(4, dtype=dtype))


@pytest.mark.parametrize("spec", [*ROPES, "rope-axial", "rope-mixed"])
def test_prefix_tokens_are_not_rotated(spec):
    geometry = irpe.Grid(2, 3, prefix=2) if "-" in spec else irpe.Sequence(6, prefix=2)
    (module,) = irpe.build(spec, dim=16, num_heads=2, prefix=1).values()
    x = torch.randn(1, 2, 8, 8)
    y, z = module.transform(x, x, geometry)
    assert torch.equal(y[:, :, :2], x[:, :, :2]) and torch.equal(z[:, :, :2], x[:, :, :2])
    assert not torch.allclose(y[:, :, 4:], x[:, :, 4:])


@pytest.mark.parametrize("spec", [*ROPES, "rope-axial"])
def test_one_table_for_all_layers(spec):
    geometry = irpe.Grid(3, 3) if "-" in spec else irpe.Sequence(9)
    first, second = (rope(spec, 16) for _ in range(2))
    x = torch.randn(1, 2, 9, 16)
    first.transform(x, x, geometry)
    made = first.tables(geometry, x)
    assert second.tables(geometry, x)[0] is made[0] and made[0] is made[1]
    assert made[0].dtype == torch.float32


@pytest.mark.parametrize("spec", ROPES)
def test_decoding_is_the_full_forward(spec):
    """Rotated keys are cached; new queries come with their positions, one or several at a time."""
    q, k, v = (torch.randn(2, 2, 9, 16, dtype=F64) for _ in range(3))
    where = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [3, 4, 5, 9, 10, 11, 12, 13, 14]])
    module = rope(spec, 16)
    full = module.transform(q, k, irpe.Sequence(9, positions=where))
    wanted = irpe.attention(*full, v, is_causal=True)
    cached, outs = [], []
    for start, stop in ((0, 4), (4, 5), (5, 8), (8, 9)):
        new = irpe.Sequence(stop - start, positions=where[:, start:stop])
        on_q, on_k = module.transform(q[:, :, start:stop], k[:, :, start:stop], new)
        cached.append(on_k)
        outs.append(irpe.attention(on_q, torch.cat(cached, 2), v[:, :, :stop], is_causal=True))
    torch.testing.assert_close(torch.cat(outs, 2), wanted, rtol=1e-11, atol=1e-11)
    # The same with keys that are rotated at each step, told by keys=.
    one = irpe.Sequence(2, positions=where[:, 7:], keys=where)
    again = irpe.attention(*module.transform(q[:, :, 7:], k, one), v, is_causal=True)
    torch.testing.assert_close(again, wanted[:, :, 7:], rtol=1e-11, atol=1e-11)


def test_padding_on_the_left_does_not_matter():
    layer = irpe.RPEAttention(32, 2, "rope", prefix=0, causal=True, dtype=F64)
    x = torch.randn(1, 7, 32, dtype=F64)
    wanted = layer(x, irpe.Sequence(7))
    for pad in (1, 5):
        padded = torch.cat((torch.randn(1, pad, 32, dtype=F64), x), 1)
        seen = (torch.arange(7 + pad) >= pad)[None, None, None]
        found = layer(padded, irpe.Sequence(7 + pad), mask=seen)[:, pad:]
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def test_a_gap_between_chunks_hides_nothing():
    """A token of the first segment is seen from the last one, across a gap of positions."""
    layer = irpe.RPEAttention(32, 2, "rope", prefix=0, causal=True, dtype=F64)
    x, geometry = torch.randn(1, 8, 32, dtype=F64), at(0, 1, 2, 3, 500, 501, 502, 503)
    changed = x.clone()
    changed[:, 1] += 1
    before, after = layer(x, geometry), layer(changed, geometry)
    assert ((before - after)[:, 4:].abs().amax(-1) > 1e-4).all()
    assert torch.equal(before[:, :1], after[:, :1])


def table_frequencies(spec, D):
    """Radians and factor of a spec, from its table at position 1."""
    cos, sin = rope(spec, D).tables(at(1), torch.zeros(1, dtype=F64))[0][:, 0]
    return torch.atan2(sin, cos), torch.hypot(sin, cos)


@pytest.mark.parametrize("D", [16, 64, 128])
def test_scaled_frequencies(D):
    base, _ = table_frequencies("rope", D)
    torch.testing.assert_close(base, torch.tensor(plain.frequencies(D, 10000.0), dtype=F64))
    found, _ = table_frequencies("rope,scaling=linear,factor=4", D)
    torch.testing.assert_close(found, base / 4, rtol=1e-12, atol=0)
    found, _ = table_frequencies("rope,scaling=ntk,factor=4", D)
    wanted = plain.frequencies(D, 10000.0 * 4 ** (D / (D - 2)))
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=F64), rtol=1e-12, atol=0)
    torch.testing.assert_close(found[-1], base[-1] / 4, rtol=1e-12, atol=0)
    assert found[0] == base[0]
    found, factor = table_frequencies("rope,scaling=yarn,factor=4,original=4096", D)
    wanted, mscale = plain.yarn(D, 10000.0, 4.0, 4096)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=F64), rtol=1e-12, atol=0)
    torch.testing.assert_close(factor, torch.full_like(factor, mscale), rtol=1e-12, atol=0)
    torch.testing.assert_close(found[0], base[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[-1], base[-1] / 4, rtol=1e-12, atol=0)


SHORT, LONG = [1 + t / 16 for t in range(8)], [2.0 + t for t in range(8)]
FACTORS = f"short_factor={':'.join(map(str, SHORT))},long_factor={':'.join(map(str, LONG))}"


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize(
    ("spec", "wanted", "scale"),
    [
        ("scaling=llama3,factor=8,original=64", lambda n: plain.llama3(16, 1e4, 8, 64), 1.0),
        (
            "scaling=llama3,factor=4,original=64,low_freq_factor=2,high_freq_factor=9",
            lambda n: plain.llama3(16, 1e4, 4, 64, 2.0, 9.0),
            1.0,
        ),
        (
            "scaling=yarn,factor=4,original=64,beta_fast=9,beta_slow=2",
            lambda n: plain.yarn(16, 1e4, 4, 64, 9.0, 2.0)[0],
            0.1 * math.log(4) + 1,
        ),
        (
            "scaling=yarn,factor=4,original=64,attention_factor=1.7",
            lambda n: plain.yarn(16, 1e4, 4, 64)[0],
            1.7,
        ),
        (
            "base=500,scaling=dynamic,factor=2,original=64",
            lambda n: plain.dynamic(16, 500.0, 2, 64, n),
            1.0,
        ),
        (
            f"scaling=longrope,factor=4,original=64,{FACTORS}",
            lambda n: plain.longrope(16, 1e4, 64, SHORT, LONG, n),
            math.sqrt(1 + math.log(4) / math.log(64)),
        ),
        (
            f"scaling=longrope,attention_factor=1.25,original=64,{FACTORS}",
            lambda n: plain.longrope(16, 1e4, 64, SHORT, LONG, n),
            1.25,
        ),
    ],
)
def test_scalings_of_released_models(spec, wanted, scale, length):
    """Whole texts and given positions alike; at position 1 the angle is the frequency."""
    module = rope(f"rope,{spec}", 16)
    whole = irpe.Sequence(length + 1) if length == 1 else irpe.Sequence(length)
    given = irpe.Sequence(2, positions=torch.tensor([[0, 1]]), keys=torch.tensor([[1, length - 1]]))
    for geometry in (whole, given):
        (cos, sin), _ = module.tables(geometry, torch.zeros(1, dtype=F64))
        cos, sin = (x[..., 1, :].flatten() for x in (cos, sin))
        seen = max(length, 2)
        truth = torch.tensor(wanted(seen), dtype=F64)
        torch.testing.assert_close(torch.atan2(sin, cos), truth, rtol=1e-10, atol=0)
        torch.testing.assert_close(torch.hypot(sin, cos), torch.full_like(truth, scale))
    assert irpe.parse(str(module.spec)) == module.spec


@pytest.mark.parametrize("scaling", ["linear", "ntk", "yarn"])
def test_a_factor_of_one_changes_nothing(scaling):
    original = ",original=512" if scaling == "yarn" else ""
    x, geometry = torch.randn(1, 2, 9, 16, dtype=F64), irpe.Sequence(9)
    found = turned(f"rope,scaling={scaling},factor=1{original}", x, geometry)
    torch.testing.assert_close(found, turned("rope", x, geometry), rtol=1e-13, atol=1e-13)


def test_interpolation_is_fractional_positions():
    x = torch.randn(1, 2, 9, 16, dtype=F64)
    quarter = irpe.Sequence(9, positions=torch.arange(9) / 4)
    found = turned("rope,scaling=linear,factor=4", x, irpe.Sequence(9))
    torch.testing.assert_close(found, turned("rope", x, quarter), rtol=1e-12, atol=1e-12)


def test_yarn_scales_logits_by_the_square_of_its_factor():
    q, k = (torch.randn(1, 2, 1, 16, dtype=F64) for _ in range(2))
    found = logits("rope,scaling=yarn,factor=8,original=4096", q, k, at(0))
    mscale = 0.1 * math.log(8) + 1
    torch.testing.assert_close(found, q @ k.mT * mscale**2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", ["yx", "xy"])
def test_axial_turns_each_half_by_an_axis(order):
    x = torch.randn(1, 1, 12, 8, dtype=F64)
    module = irpe.build(f"rope-axial,order={order}", dim=8, num_heads=1)["rope"]
    y, _ = module.transform(x, x, irpe.Grid(3, 4))
    axes = [torch.arange(3).repeat_interleave(4), torch.arange(4).repeat(3)]
    axes = axes if order == "yx" else axes[::-1]
    for half, positions in zip((slice(0, 4), slice(4, 8)), axes, strict=True):
        one = irpe.build("rope,base=100", dim=4, num_heads=1)["rope"]
        along = irpe.Sequence(12, positions=positions)
        wanted, _ = one.transform(x[..., half], x[..., half], along)
        torch.testing.assert_close(y[..., half], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spec", ["rope-axial", "rope-mixed"])
def test_moving_a_whole_picture_changes_nothing(spec):
    (module,) = modules(spec, 2, 8, False).values()
    q, k = (torch.randn(1, 2, 6, 8, dtype=F64) for _ in range(2))
    where = torch.tensor(list(itertools.product(range(2), range(3))))
    grids = [irpe.Geometry(where + torch.tensor(shift)) for shift in ((0, 0), (5, 70))]
    first, second = (a @ b.mT for a, b in (module.transform(q, k, g) for g in grids))
    torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10)


def test_mixed_starts_with_the_papers_magnitudes_in_random_directions():
    torch.manual_seed(1)
    module = irpe.build("rope-mixed", dim=64, num_heads=4)["rope"]
    sizes = module.frequencies.norm(dim=0)
    powers = torch.tensor([10.0 ** (-4 * t / 16) for t in range(4)]).repeat(2)
    torch.testing.assert_close(sizes, powers.expand(4, -1))
    first, second = module.frequencies.unflatten(-1, (2, 4)).unbind(2)  # at a right angle
    torch.testing.assert_close((first * second).sum(0), torch.zeros(4, 4), atol=1e-6, rtol=0)
    assert module.frequencies.std(1).min() > 1e-4
    other = irpe.build("rope-mixed", dim=64, num_heads=4, device="meta")["rope"]
    other.to_empty(device="cpu").reset_parameters()
    torch.testing.assert_close(other.frequencies.norm(dim=0), sizes)


def test_mixed_frequencies_learn_and_do_not_decay():
    layer = irpe.RPEAttention(32, 2, "rope-mixed", prefix=1)
    layer(torch.randn(1, 13, 32), irpe.Grid(3, 4, prefix=1)).square().sum().backward()
    assert layer.rope.frequencies.grad.abs().min() > 0
    groups = irpe.param_groups(layer, weight_decay=0.1, table_lr=0.5)
    found = {id(p): g for g in groups for p in g["params"]}[id(layer.rope.frequencies)]
    assert found["weight_decay"] == 0.0 and found["lr"] == 0.5


def test_mixed_in_low_precision_computes_angles_in_float32():
    module = irpe.build("rope-mixed", dim=16, num_heads=2)["rope"].bfloat16()
    x = torch.randn(1, 2, 12, 8).bfloat16()
    found, _ = module.transform(x, x, irpe.Grid(3, 4))
    module.double()  # the same rounded frequencies
    wanted, _ = module.transform(x.double(), x.double(), irpe.Grid(3, 4))
    assert (found.double() - wanted).abs().max() <= 2**-8 * wanted.abs().max()


@pytest.mark.parametrize(
    ("spec", "D", "says"),
    [
        ("rope", 7, ("7", "even")),
        ("rope,fraction=0.5", 6, ("3", "head_dim=6", "even")),
        ("rope,fraction=0.3", 8, ("2.4", "head_dim=8")),
        ("rope,scaling=ntk,factor=2", 2, ("ntk", "4")),
        ("rope-axial", 6, ("multiple of 4", "6")),
        ("rope-mixed", 6, ("multiple of 4", "6")),
    ],
)
def test_head_dims_that_cannot_be_rotated(spec, D, says):
    with pytest.raises(irpe.IrpeError) as caught:
        irpe.build(spec, dim=D, num_heads=1)
    assert all(part in str(caught.value) for part in says)


@pytest.mark.parametrize(
    ("spec", "geometry", "says"),
    [
        ("rope", irpe.Grid(2, 3), ("rope-axial", "Grid(2, 3")),
        ("rope-axial", irpe.Sequence(6), ("use rope", "1")),
        ("rope-mixed", irpe.Sequence(6), ("use rope", "1")),
        ("rope", None, ("None", "irpe.Sequence")),
    ],
)
def test_positions_on_other_axes(spec, geometry, says):
    (module,) = irpe.build(spec, dim=16, num_heads=2).values()
    x = torch.randn(1, 2, 6, 8)
    with pytest.raises(irpe.IrpeError) as caught:
        module.transform(x, x, geometry)
    assert all(part in str(caught.value) for part in says)
    place = irpe.Sequence(6) if spec == "rope" else irpe.Grid(2, 3)
    with pytest.raises(irpe.IrpeError, match="8.*1, 2, 6, 16"):
        module.transform(torch.randn(1, 2, 6, 16), x, place)


@pytest.mark.parametrize("spec", ["rope", "rope-mixed", "pia", "sinusoidal", "learned"])
def test_tokens_that_do_not_match_their_positions(spec):
    """One position is not that of all, nor one sample's that of another batch."""
    (module,) = irpe.build(spec, dim=16, num_heads=2, causal=True).values()
    grid = spec == "rope-mixed"
    x, y = torch.randn(3, 6, 16), torch.randn(3, 2, 6, 8)
    for geometry, says in (
        (irpe.Grid(1, 1) if grid else irpe.Sequence(1), "1 queries.*L=6"),
        (
            irpe.Grid(9, 9, positions=torch.arange(24).view(2, 6, 2) % 9)
            if grid
            else irpe.Sequence(6, positions=torch.arange(12).view(2, 6)),
            "2 samples.*batch of 3",
        ),
    ):
        hook = {"pia": lambda g: module.inputs(x, x, g)}.get(
            spec, lambda g: (module.embed(x, g), module.transform(y, y, g))
        )
        with pytest.raises(irpe.IrpeError, match=says):
            hook(geometry)


def test_rotation_oracle_is_the_spec():
    """The oracle's own check: turning by hand what the module turns."""
    x = torch.randn(1, 2, 3, 8, dtype=F64)
    turn = rotation("rope,layout=half", None, 8)
    wanted = torch.stack([torch.stack([turn(h, p, x[0, h, p]) for p in range(3)]) for h in (0, 1)])
    assert torch.allclose(turned("rope,layout=half", x, irpe.Sequence(3))[0], wanted)


def test_a_layer_with_rotary_has_no_parameters_of_it():
    layer = irpe.RPEAttention(32, 2, "rope", prefix=0)
    assert set(layer.state_dict()) == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    assert not list(layer.rope.buffers()) and isinstance(layer.rope, nn.Module)
