"""Continuous bias and decomposed vectors on images, against loops and timm."""

import math

import pytest
import torch
from hosting import layer_compiles_exports_and_rounds
from oracles import text
from torch.nn.functional import interpolate

import irpe

F64 = torch.float64
SPECS = ["cpb,hidden=16", "cpb,form=cr,hidden=16", "cpb,window=4,hidden=16",
         "decomposed,size=5", "decomposed,size=3,width=7", "t5-axes,buckets=8,max=6"]  # fmt: skip
GRIDS = [(5, 5), (3, 7), (1, 4), (6, 2), (1, 1)]


def made(spec, heads=2, dim=6, dtype=F64):
    torch.manual_seed(0)
    (module,) = irpe.build(spec, dim=heads * dim, num_heads=heads, dtype=dtype).values()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def value(module, grid, q, h, i, j):
    """What is added to logit (i, j) of a head, for patches (row, column), pair by pair."""
    spec, (dy, dx) = module.spec, (i[0] - j[0], i[1] - j[1])
    if str(spec).startswith("t5-axes"):
        return (
            module.table[0, h, text.t5_bucket(dy, 8, 6, True)]
            + module.table[1, h, text.t5_bucket(dx, 8, 6, True)]
        )
    if str(spec).startswith("decomposed"):
        total = 0.0
        for table, offset, side in (
            (module.rel_pos_h, dy, grid.height),
            (module.rel_pos_w, dx, grid.width),
        ):
            own = interpolate(table.t()[None], size=2 * side - 1, mode="linear")[0].t()
            own = table if len(table) == 2 * side - 1 else own
            total = total + q @ own[offset + side - 1]
        return total
    coordinates = []
    for offset, side in ((dy, grid.height), (dx, grid.width)):
        if spec.form == "swin":
            u = 8 * offset / max((spec.window or side) - 1, 1)
            found = math.copysign(math.log2(1 + abs(u)) / math.log2(8), u)
        else:
            found = math.copysign(math.log(1 + abs(offset)), offset)
        coordinates.append(found)
    out = module.fc2((module.fc1(torch.tensor(coordinates, dtype=F64))).clamp(min=0))[h]
    return 16 * out.sigmoid() if spec.form == "swin" else out


@pytest.mark.cases(3)
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("shape", GRIDS)
@pytest.mark.parametrize("spec", SPECS)
def test_against_loops(spec, shape, prefix):
    module, grid = made(spec), irpe.Grid(*shape, prefix=prefix)
    L = grid.query_length
    q, k, v = (torch.randn(1, 2, L, 6, dtype=F64, requires_grad=True) for _ in range(3))
    found = irpe.attention(q, k, v, module.terms(grid))
    places = [None] * prefix + [(y, x) for y in range(shape[0]) for x in range(shape[1])]
    rows = []
    for h in range(2):
        for i, here in enumerate(places):
            logits = [
                q[0, h, i] @ k[0, h, j] / math.sqrt(6)
                + (
                    0.0
                    if None in (here, there)
                    else value(module, grid, q[0, h, i], h, here, there)
                )
                for j, there in enumerate(places)
            ]
            rows.append(torch.stack(logits).softmax(0) @ v[0, h])
    wanted = torch.stack(rows).view(1, 2, L, 6)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    inputs = [q, k, v, *module.parameters()]
    ours, theirs = (
        torch.autograd.grad(x.square().sum(), inputs, allow_unused=True) for x in (found, wanted)
    )
    for a, b in zip(ours, theirs, strict=True):
        if b is None:  # a network of one patch and no other has no gradient in a loop
            assert a is None or a.abs().max() < 1e-9
        else:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("window", [(5, 5), (3, 6)])
@pytest.mark.parametrize(("form", "pretrained"), [("swin", 0), ("swin", 4), ("cr", 0)])
def test_continuous_bias_is_timms(form, pretrained, window):
    from timm.layers import RelPosMlp

    theirs = RelPosMlp(
        window,
        3,
        hidden_dim=16,
        prefix_tokens=1,
        mode=form,
        pretrained_window_size=(pretrained,) * 2,
    ).eval()
    options = f",window={pretrained}" if pretrained else ""
    ours = irpe.build(f"cpb,form={form},hidden=16{options}", dim=12, num_heads=3, prefix=1)["cpb"]
    ours.load_state_dict({name[4:]: x for name, x in theirs.state_dict().items() if "mlp." in name})
    (term,) = ours.terms(irpe.Grid(*window, prefix=1))
    found = term.table[:, term.buckets.dense(torch.device("cpu"))]
    torch.testing.assert_close(found, theirs.get_bias()[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 6), (4, 9)])
def test_decomposed_is_that_of_sam(shape):
    from timm.models.vision_transformer_sam import Attention

    theirs = Attention(24, 3, use_rel_pos=True, input_size=(6, 6)).double().eval()
    for table in (theirs.rel_pos_h, theirs.rel_pos_w):
        torch.nn.init.normal_(table)
    ours = irpe.build("decomposed,size=6", dim=24, num_heads=3, dtype=F64)["decomposed"]
    ours.load_state_dict({n: x for n, x in theirs.state_dict().items() if "rel_pos" in n})
    x = torch.randn(2, *shape, 24, dtype=F64)
    qkv = theirs.qkv(x.flatten(1, 2)).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    out = irpe.attention(*qkv, ours.terms(irpe.Grid(*shape)))
    found = theirs.proj(out.transpose(1, 2).flatten(2)).view(x.shape)
    torch.testing.assert_close(found, theirs(x), rtol=1e-6, atol=1e-6)


# Middle of each head's field of view, in degrees: 0 is up, 90 is right.
MIDDLES = {
    180: [0, 180, 270, 90, 45, 315, 135, 225],
    90: [315, 45, 225, 135, 0, 180, 270, 90],
    45: [337.5, 202.5, 292.5, 67.5, 22.5, 157.5, 247.5, 112.5],
}


@pytest.mark.cases(5)
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("shape", [(4, 4), (3, 6), (5, 1)])
@pytest.mark.parametrize(("heads", "directed"), [(12, 8), (6, 4), (24, 16), (2, 2), (3, 2)])
@pytest.mark.parametrize("fov", [180, 90, 45])
def test_lookhere_by_angles(fov, heads, directed, shape, prefix):
    module = irpe.build(f"lookhere,fov={fov},slope=3", dim=heads * 4, num_heads=heads, dtype=F64,
                        prefix=prefix)["lookhere"]  # fmt: skip
    assert not list(module.parameters()) and not module.state_dict()
    (term,) = module.terms(irpe.Grid(*shape, prefix=prefix))
    found = term.table[:, term.buckets.dense(torch.device("cpu"))]
    places = [None] * prefix + [(y, x) for y in range(shape[0]) for x in range(shape[1])]
    for h in range(heads):
        slope = 2.0 ** -(1 + h // 8) if h < directed else 4.0 ** -(1 + (h - directed) % 4)
        for i, here in enumerate(places):
            for j, there in enumerate(places):
                if None in (here, there):
                    assert found[h, i, j] == 0
                    continue
                dy, dx = there[0] - here[0], there[1] - here[1]
                angle = (math.degrees(math.atan2(dx, -dy)) - MIDDLES[fov][h % 8] + 180) % 360 - 180
                far = math.hypot(dy, dx)
                if h < directed and far and abs(angle) > fov / 2 + 1e-6:
                    assert found[h, i, j] <= -1e4
                else:
                    assert found[h, i, j] == pytest.approx(-3 * slope * far)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_hidden_keys_have_no_weight(dtype, backend):
    module, grid = (
        irpe.build("lookhere,fov=45", dim=48, num_heads=12, dtype=dtype)["lookhere"],
        irpe.Grid(6, 6),
    )
    q, k, v = (torch.randn(1, 12, 36, 4, dtype=dtype, requires_grad=True) for _ in range(3))
    out = irpe.attention(q, k, v, module.terms(grid), backend=backend)
    (term,) = module.terms(grid)
    hidden = term.table[:, term.buckets.dense(torch.device("cpu"))] < -1e4
    seen = [not hidden[0, 0, j] for j in range(36)]  # from the first patch, upwards: itself alone
    assert sum(seen) == 1
    torch.testing.assert_close(out[0, 0, 0], v[0, 0, 0])
    (grad,) = torch.autograd.grad(out[0, 0, 0].sum(), v)
    assert torch.isfinite(grad).all() and grad[0, 0, 1:].abs().max() == 0


@pytest.mark.parametrize("spec", [*SPECS, "lookhere"])
def test_dropped_patches_are_rows_of_the_whole(spec):
    module, grid = made(spec), irpe.Grid(4, 5, prefix=1)
    kept = torch.tensor([[0, 3, 7, 19], [2, 4, 11, 12]])
    q, k, v = (torch.randn(2, 2, 5, 6, dtype=F64) for _ in range(3))
    found = irpe.attention(q, k, v, module.terms(grid.select(kept)))
    for b in range(2):
        places = torch.cat((torch.zeros(1, dtype=torch.long), kept[b] + 1))
        whole = [
            torch.zeros(1, 2, 21, 6, dtype=F64).index_copy(2, places, x[b : b + 1])
            for x in (q, k, v)
        ]
        seen = torch.zeros(21, dtype=torch.bool).index_fill(0, places, True)
        wanted = irpe.attention(*whole, module.terms(grid), mask=seen)
        torch.testing.assert_close(found[b], wanted[0][:, places], rtol=1e-10, atol=1e-10)


@pytest.mark.cases(1)
@pytest.mark.parametrize("spec", [*SPECS, "lookhere"])
def test_layers_compile_export_and_low_precision(spec):
    layer = irpe.RPEAttention(12, 2, spec, prefix=1)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    grid, x = irpe.Grid(3, 4, prefix=1), torch.randn(2, 13, 12)
    layer_compiles_exports_and_rounds(layer, x, grid)


@pytest.mark.parametrize("spec", [*SPECS, "lookhere"])
def test_attached_to_a_timm_vit_at_two_sizes(spec):
    import timm

    options = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2,
               "num_classes": 3, "dynamic_img_size": True}  # fmt: skip
    model = timm.create_model("vit_tiny_patch16_224", **options)
    irpe.attach(model, spec)
    for size in ((32, 32), (24, 40)):
        model(torch.randn(2, 3, *size)).sum().backward()
    assert irpe.specs(model)["blocks.0.attn"] == str(irpe.parse(spec))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    with pytest.raises(irpe.IrpeError, match=r"size of a grid|built for 2 axes"):
        made(spec).terms(irpe.Sequence(4))
