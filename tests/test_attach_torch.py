"""attach on torchvision's VisionTransformer and on torch's nn.TransformerEncoder."""

import hosting
import pytest
import torch
from hosting import CHECKS, QK, QKV, fill
from oracles.buckets import grid
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential
from torchvision.models import VisionTransformer, resnet18

import irpe

GRID = irpe.Grid(3, 5, prefix=2)


def vit(seed, **options):
    torch.manual_seed(seed)
    model = VisionTransformer(64, 16, 2, 2, 32, 48, num_classes=5, **options).double()
    for p in model.parameters():  # some start at zero, and hide what they multiply
        if not p.any() or p.dim() == 1:
            nn.init.normal_(p, mean=float(p.dim() == 1), std=0.2)
    for layer in model.encoder.layers:
        nn.init.normal_(layer.self_attention.in_proj_weight, std=0.25)
    return model


def encoder(seed, layers=2, **options):
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(
        32, 2, 48, 0.0, batch_first=True, dtype=torch.float64, **options
    )
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=not options)
    for layer in model.layers:
        nn.init.normal_(layer.self_attn.in_proj_weight, std=0.25)
    return model


def image(*size):
    torch.manual_seed(2)
    return torch.randn(2, 3, *(size or (64, 64)), dtype=torch.float64)


def tokens():
    torch.manual_seed(2)
    return torch.randn(2, 17, 32, dtype=torch.float64)


def on_image(model):
    return model(image())


def on_tokens(model):
    with irpe.located(GRID):
        return model(tokens())


def attach_inside(model, spec, **given):
    with irpe.located(GRID):
        return irpe.attach(model, spec, **given)


VIT = (vit, on_image, irpe.attach)
CASES = {
    "torchvision": VIT,
    "encoder": (encoder, on_tokens, attach_inside),
    "norm_first": (lambda seed: encoder(seed, norm_first=True), on_tokens, attach_inside),
}


@pytest.mark.cases(1)
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES)
def test_attached(case, check):
    getattr(hosting, check)(*CASES[case])


@pytest.mark.full
def test_export():
    hosting.exports(vit, on_image, (image(),))
    with irpe.located(GRID):
        hosting.exports(encoder, on_tokens, (tokens(),))


@pytest.mark.full
def test_a_compiled_encoder_knows_another_grid_of_the_same_length():
    model = encoder(0)
    attach_inside(model, QKV)
    compiled = torch.compile(fill(model), backend="aot_eager", fullgraph=True)
    for shape in ((3, 5), (5, 3), (3, 5), (1, 15)):
        with irpe.located(irpe.Grid(*shape, prefix=2)):
            torch.testing.assert_close(compiled(tokens()), model(tokens()))


def by_hand(model, x):
    """torchvision's forward pass asks for a square of one size; its parts do not."""
    patches = model.conv_proj(x).flatten(2).transpose(1, 2)
    return model.encoder(torch.cat((model.class_token.expand(len(x), -1, -1), patches), 1))


def _projected(module, x):
    qkv = nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias)
    return [t.unflatten(2, (2, 16)).transpose(1, 2) for t in qkv.chunk(3, 2)]


@pytest.mark.parametrize("case", ["torchvision", "encoder"])
def test_a_layer_by_loops_on_a_rectangle(case):
    make, run, attach = CASES[case]
    model = make(0)
    attach(model, QKV)
    fill(model)
    if case == "encoder":
        module, shape, prefix = model.layers[1].self_attn, (3, 5), 2
    else:
        module, shape, prefix = model.encoder.layers[1].self_attention, (2, 8), 1

        def run(m):
            return by_hand(m, image(32, 128))

    x, _, (found, _) = hosting.seen_by(module, lambda: run(model))
    places = [grid(*shape, prefix)] * 2
    wanted = hosting.by_loops(module, _projected(module, x), module.out_proj, places)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_grids_before_one_backward(checkpointing):
    """2x8 and 8x2 have one length: each pass keeps its own, also where layers are recomputed."""
    model = vit(0)
    irpe.attach(model, QKV)
    fill(model)
    images = [image(32, 128), image(128, 32)]
    layers = model.encoder.layers

    def together():
        if checkpointing:
            layers.forward = lambda x: checkpoint_sequential(layers, 2, x, use_reentrant=False)

    hosting.sum_of_passes(model, [lambda x=x: by_hand(model, x) for x in images], together)


def test_torchs_short_cuts_do_not_go_round_the_terms():
    """Padded batches become nested tensors in evaluation, and single layers a fused kernel."""
    plain, model = encoder(0).eval(), encoder(0).eval()
    padding = torch.zeros(2, 17, dtype=torch.bool)
    padding[1, 12:] = True
    assert plain.use_nested_tensor
    attach_inside(model, QKV)
    with torch.no_grad(), irpe.located(GRID):
        wanted = plain(tokens(), src_key_padding_mask=padding)
        found = model(tokens(), src_key_padding_mask=padding)
        torch.testing.assert_close(found[0], wanted[0])
        torch.testing.assert_close(found[1, :12], wanted[1, :12])
        fill(model)
        moved = model(tokens(), src_key_padding_mask=padding)
        assert not torch.allclose(moved[0], wanted[0], atol=1e-3)
        model.use_nested_tensor = True  # as where only a layer of it was attached to
        with pytest.raises(irpe.IrpeError, match="whole nn.TransformerEncoder"):
            model(tokens(), src_key_padding_mask=padding)
        model.use_nested_tensor = False
        one = encoder(0).eval().layers[0]
        before = one(tokens())
        irpe.attach(one, QKV)
        assert not torch.allclose(fill(one)(tokens()), before, atol=1e-3)
    irpe.detach(model)
    assert model.use_nested_tensor and not hasattr(model, "rpe_nested")


def test_encoders_built_of_an_equipped_layer():
    """nn.TransformerEncoder copies the layer it is given, encoding and all."""
    layer = encoder(0).layers[0]
    attach_inside(layer, QKV)
    with pytest.warns(UserWarning, match="_qkv_same_embed_dim"):
        model = nn.TransformerEncoder(layer, 2)
    fill(model)
    assert len({id(p) for n, p in model.named_parameters() if "lookup" in n}) == 6
    assert on_tokens(model).isfinite().all()


def test_other_shapes_of_torchvisions_encoder():
    """A stem of several convolutions, rotary embeddings, some layers only, one after the other."""
    from torchvision.models.vision_transformer import ConvStemConfig

    model = vit(0, conv_stem_configs=[ConvStemConfig(8, 3, 4), ConvStemConfig(16, 3, 4)]).eval()
    before = on_image(model)
    report = irpe.attach(model, QK, where="encoder.layers.encoder_layer_1.*")
    assert report.modules == ("encoder.layers.encoder_layer_1.self_attention",)
    torch.testing.assert_close(on_image(model), before, rtol=1e-9, atol=1e-10)
    irpe.attach(model, "rope-axial", where="*layer_0*")
    turned = on_image(model)
    assert not torch.allclose(turned, before, atol=1e-3)
    with torch.no_grad():
        halves = model.conv_proj(image()).flatten(2).transpose(1, 2)
        x = torch.cat((model.class_token.expand(2, -1, -1), halves), 1)
        x = x + model.encoder.pos_embedding
        for layer in model.encoder.layers[:2]:
            x = layer(x)
        torch.testing.assert_close(model.heads(model.encoder.ln(x)[:, 0]), turned)


def test_wrong_use():
    model = vit(0)
    before = hosting.fingerprint(model)
    with pytest.raises(irpe.IrpeError, match="t5.*one axis"):
        irpe.attach(model, "t5,buckets=8,max=20")
    narrow = nn.MultiheadAttention(12, 2)
    with pytest.raises(irpe.IrpeError, match="6"):  # a head of 6 channels does not turn on two axes
        irpe.attach(narrow, "rope-axial")
    assert type(narrow) is nn.MultiheadAttention and hosting.fingerprint(model) == before
    with pytest.raises(irpe.IrpeError, match="'blocks.*' matches none.*encoder_layer_0"):
        irpe.attach(model, QK, where="blocks.*")
    irpe.attach(model, QK)
    with pytest.raises(irpe.IrpeError, match="encoder_layer_0.*encoding already.*detach"):
        irpe.attach(model, QK)
    with pytest.raises(irpe.IrpeError, match="no grid"):
        model.encoder(torch.zeros(1, 17, 32, dtype=torch.float64))
    on_image(model)
    with pytest.raises(irpe.IrpeError, match="no grid"):  # nothing is left over from the last pass
        model.encoder(torch.zeros(1, 17, 32, dtype=torch.float64))
    with pytest.raises(irpe.IrpeError, match="ResNet has no attention.*irpe.RPEAttention"):
        irpe.attach(resnet18(), QK)
    plain = encoder(0)
    irpe.attach(plain, QK)
    with pytest.raises(irpe.IrpeError, match="attach inside"):
        on_tokens(plain)
