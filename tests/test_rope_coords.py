"""rope-axial over fractions of the grid, and their moves while training (DINOv3)."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import irpe

F64 = torch.float64
MOVES = "rope-axial,layout=half,coords=separate,shift=0.3,jitter=1.5,rescale=2"


def rope(spec, D=16, H=2, axes=2):
    return irpe.build(spec, dim=H * D, num_heads=H, axes=axes)["rope"]


def centre(p, n):
    return 2 * (p + 0.5) / n - 1


def by_loops(x, sides, prefix, coords, layout="interleaved", order="yx", base=100.0, move=None):
    """x ``[1, H, L, D]`` of a whole grid, rotated pair by pair of channels."""
    out, (_, _, L, D), A = x.clone(), x.shape, len(sides)
    each = D // (2 * A)
    divide = {"separate": sides, "max": [max(sides)] * A, "min": [min(sides)] * A}[coords]
    for i in range(prefix, L):
        rest, where = i - prefix, []
        for side in reversed(sides):
            where.insert(0, rest % side)
            rest //= side
        placed = [centre(p, n) for p, n in zip(where, divide, strict=True)]
        if move is not None:
            placed = [(c + float(s)) * float(f) for c, s, f in zip(placed, *move, strict=True)]
        for part, c in enumerate(placed if order == "yx" else placed[::-1]):
            for t in range(each):
                angle = 2 * math.pi * c * base ** (-t / each)
                plane = part * each + t
                a, b = (plane, plane + A * each) if layout == "half" else (2 * plane, 2 * plane + 1)
                cos, sin = math.cos(angle), math.sin(angle)
                out[..., i, a] = x[..., i, a] * cos - x[..., i, b] * sin
                out[..., i, b] = x[..., i, b] * cos + x[..., i, a] * sin
    return out


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("sides", [(3, 4), (5, 1), (2, 3, 2), (1, 1)])
@pytest.mark.parametrize("coords", ["separate", "max", "min"])
@pytest.mark.parametrize("options", [{}, {"layout": "half", "order": "xy", "base": 30.0}])
def test_against_loops(options, coords, sides, prefix):
    said = "".join(f",{name}={value}" for name, value in options.items())
    kind = irpe.Grid if len(sides) == 2 else irpe.Volume
    geometry = kind(*sides, prefix=prefix)
    q, k = torch.randn(2, 1, 2, geometry.query_length, 16, dtype=F64)
    module = rope(f"rope-axial,coords={coords}{said}", axes=len(sides))
    for found, x in zip(module.transform(q, k, geometry), (q, k), strict=True):
        wanted = by_loops(x, sides, prefix, coords, **options)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axes", [2, 3])
def test_gradients(axes):
    module = rope("rope-axial,coords=separate", axes=axes)
    geometry = irpe.Grid(2, 3, 1) if axes == 2 else irpe.Volume(1, 2, 3, 1)
    x = torch.randn(1, 2, 7, 16, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: module.transform(x, x, geometry)[0], x)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("coords", ["separate", "max", "min"])
def test_it_is_timms(coords, layout, training):
    from timm.layers import apply_rot_embed_cat
    from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3

    moves = {"shift_coords": 0.2, "jitter_coords": 1.3, "rescale_coords": 2.0}
    theirs = RotaryEmbeddingDinoV3(
        16, normalize_coords=coords, rotate_half=layout == "half", **moves
    ).train(training)
    spec = f"rope-axial,layout={layout},coords={coords},shift=0.2,jitter=1.3,rescale=2"
    x = torch.randn(1, 2, 15, 16)
    torch.manual_seed(4)
    wanted = apply_rot_embed_cat(x, theirs.get_embed((3, 5)), half=layout == "half")
    torch.manual_seed(4)
    found, _ = rope(spec).train(training).transform(x, x, irpe.Grid(3, 5))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("training", [False, True])
def test_it_is_that_of_transformers(training):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("transformers.models.dinov3_vit", reason="from 4.56 on")
    from transformers.models.dinov3_vit import modeling_dinov3_vit as theirs

    config = transformers.DINOv3ViTConfig(
        hidden_size=32, num_attention_heads=2, patch_size=16, pos_embed_shift=0.3,
        pos_embed_jitter=1.5, pos_embed_rescale=2.0,
    )  # fmt: skip
    embedding = theirs.DINOv3ViTRopePositionEmbedding(config).train(training)
    q, k = torch.randn(2, 1, 2, 6 + 5, 16)
    torch.manual_seed(4)
    wanted = theirs.apply_rotary_pos_emb(q, k, *embedding(torch.zeros(1, 3, 32, 48)))
    torch.manual_seed(4)
    found = rope(MOVES).train(training).transform(q, k, irpe.Grid(2, 3, prefix=5))
    for ours, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=2e-5)


def test_moves_are_in_range_and_drawn_once_a_step():
    spec = irpe.parse(MOVES)
    drawn = torch.stack([spec.move(2, torch.device("cpu")) for _ in range(500)])
    shift, factor = drawn.unbind(1)
    assert 0.29 < shift.abs().max() <= 0.3 and factor.log().abs().max() <= math.log(3) + 1e-6
    assert (factor[:, 0] / factor[:, 1]).log().abs().max() <= 2 * math.log(1.5) + 1e-6

    layers = [rope(MOVES) for _ in range(3)]
    x = torch.randn(1, 2, 12, 16)

    def step(*grids):
        return [a.transform(x, x, grid)[0] for a, grid in zip(layers, grids, strict=True)]

    shared = irpe.Grid(3, 4)
    first, second = step(shared, shared, shared), step(shared, shared, shared)
    for outs in (first, second):
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    assert not torch.equal(first[0], second[0])
    for again in (shared, irpe.Grid(3, 4)):
        torch.manual_seed(7)
        once = step(again, again, again)
        torch.manual_seed(7)
        assert torch.equal(step(shared, shared, shared)[0], once[0])
    for layer in layers:
        layer.eval()
    assert torch.equal(step(shared, shared, shared)[0], step(shared, shared, shared)[0])


class Net(torch.nn.Module):
    def __init__(self, recompute):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(
            irpe.RPEAttention(32, 2, MOVES, prefix=1, proj_drop=0.4) for _ in range(3)
        )
        self.recompute = recompute

    def forward(self, x, grid):
        for layer in self.layers:
            if self.recompute:
                x = x + checkpoint(layer, x, grid, use_reentrant=self.recompute == "reentrant")
            else:
                x = x + layer(x, grid)
        return x


@pytest.mark.parametrize("recompute", ["reentrant", "not"])
def test_recomputation_moves_as_the_forward_pass_did(recompute):
    """Dropout too has the same random numbers; two views have a backward pass in common."""
    x, found = torch.randn(2, 13, 32), []
    for net in (Net(None), Net(recompute)):
        torch.manual_seed(3)
        inputs = x.clone().requires_grad_()
        loss = sum(net(inputs, irpe.Grid(3, 4, prefix=1)).square().sum() for _ in range(2))
        loss.backward()
        found.append([inputs.grad, *(p.grad for p in net.parameters())])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)


def test_a_new_grid_in_a_recomputation_raises():
    layer, x = irpe.RPEAttention(32, 2, MOVES), torch.randn(1, 12, 32, requires_grad=True)
    out = checkpoint(lambda x: layer(x, irpe.Grid(3, 4)), x, use_reentrant=False)
    with pytest.raises(irpe.IrpeError, match="create it outside"):
        out.sum().backward()


def test_attached_layers_move_together():
    import timm

    options = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **options).train()
    irpe.attach(model, MOVES)
    seen = []
    for block in model.blocks:
        module = block.attn.rope
        tables = module.compute
        module.compute = lambda *given, tables=tables: seen.append(tables(*given)) or tables(*given)
    image = torch.randn(2, 3, 64, 64)
    for _ in range(2):
        model(image)
    one, same, two, too = (pair[0] for pair in seen)
    assert torch.equal(one, same) and torch.equal(two, too) and not torch.equal(one, two)
    for block in model.blocks:
        del block.attn.rope.__dict__["compute"]
    model.eval()
    assert torch.equal(model(image), model(image))


@pytest.mark.cases(1)
@pytest.mark.parametrize("training", [False, True])
def test_compile_export_and_low_precision(training):
    layer = irpe.RPEAttention(32, 2, MOVES, prefix=1).train(training)
    grid, x = irpe.Grid(3, 4, prefix=1), torch.randn(2, 13, 32)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    outs = [compiled(x, irpe.Grid(3, 4, prefix=1)) for _ in range(2)]
    if training:
        assert not torch.equal(*outs)
        return
    wanted = layer(x, grid)
    torch.testing.assert_close(outs[0], wanted, rtol=1e-5, atol=1e-5)

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x, irpe.Grid(3, 4, prefix=1))

    exported = torch.export.export(Whole().eval(), (x,)).module()
    torch.testing.assert_close(exported(x), wanted, rtol=1e-5, atol=1e-5)
    low = layer.to(torch.bfloat16)(x.to(torch.bfloat16), grid)
    assert (low.float() - wanted).abs().max() < 0.1 * wanted.abs().max() + 0.05


@pytest.mark.parametrize("shift", [1, -3, 10**7])
def test_only_offsets_count(shift):
    module, places = rope("rope-axial,coords=max").eval(), torch.tensor([[0, 0], [2, 1], [1, 4]])
    q, k = torch.randn(2, 1, 2, 3, 16, dtype=F64)
    here, there = (
        module.transform(q, k, irpe.Grid(3, 5, positions=places + n)) for n in (0, shift)
    )
    allowed = 1e-12 if abs(shift) < 10 else 1e-6
    torch.testing.assert_close(there[0] @ there[1].mT, here[0] @ here[1].mT, rtol=0, atol=allowed)


def test_dropped_patches_are_those_of_the_whole():
    module, grid = rope("rope-axial,coords=separate"), irpe.Grid(4, 5, prefix=1)
    kept = torch.tensor([[0, 3, 7, 19], [2, 4, 11, 12]])
    x = torch.randn(2, 2, 21, 16)
    whole, _ = module.transform(x, x, grid)
    for b in range(2):
        at = torch.cat((torch.zeros(1, dtype=torch.long), kept[b] + 1))
        found, _ = module.transform(x[:, :, at], x[:, :, at], grid.select(kept))
        torch.testing.assert_close(found[b], whole[b][:, at])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rope-axial,shift=0.5", "shift=0.5 needs coords=separate, max or min"),
        ("rope-axial,coords=max,jitter=0.5", "jitter=0.5 must be at least 1"),
        ("rope-axial,coords=grid", "coords='grid' is not one of patches, separate, max, min"),
    ],
)
def test_what_specs_refuse(spec, message):
    with pytest.raises(irpe.IrpeError, match=message):
        irpe.parse(spec)


def test_positions_without_a_grid_raise():
    module, x = rope("rope-axial,coords=max"), torch.randn(1, 2, 3, 16)
    places = irpe.Geometry(torch.tensor([[0, 0], [2, 1], [1, 4]]))
    with pytest.raises(irpe.IrpeError, match="needs the size of a grid"):
        module.transform(x, x, places)
