"""attach and detach on timm's VisionTransformer: nothing changes until tables are trained."""

import copy

import pytest
import timm
import torch
from common import TILES
from hosting import fill, fingerprint
from oracles import attention as truth
from oracles import buckets as plain
from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import DiffParallelScalingBlock, VisionTransformer
from torch import nn

import irpe
from irpe.hosts.carry import geometry_of
from models.deit import DeiT

K, QK, QKV = (f"rpe-1.9-product-ctx-1-{on}" for on in ("k", "qk", "qkv"))
ON_GRIDS = ("rope-axial", "rope-axial,layout=half,order=xy", "rope-mixed", "alibi")


class Gated(Attention):
    """Only to switch on an option that VisionTransformer does not hand through."""

    def __new__(cls, *args, **kwargs):
        return Attention(*args, **kwargs, gated=True)


def vit(cls=VisionTransformer, seed=0, **options):
    torch.manual_seed(seed)
    small = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = cls(**{**small, "num_classes": 5, **options})
    for p in model.parameters():  # some start at zero, and hide what they multiply
        if p.dim() <= 1 or p.shape[0] == 1:
            nn.init.normal_(p, mean=float(p.dim() == 1), std=0.2)
    for block in model.blocks:  # as started, attention hardly reaches the output
        attn = getattr(block, "attn", None)
        for part in () if attn is None else (attn.qkv, attn.proj):
            nn.init.normal_(part.weight, std=0.25)
    return model


def unfused(model):
    for m in model.modules():
        if isinstance(m, Attention):
            m.fused_attn = False
    return model


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def image(*size, batch=2, seed=2):
    torch.manual_seed(seed)
    return torch.randn(batch, 3, *(size or (64, 64)))


HOSTS = {
    "plain": {},
    "attention dropout": {"attn_drop_rate": 0.5},  # off in evaluation
    "qk_norm": {"qk_norm": True},
    "scale_norm": {"scale_attn_norm": True},
    "gated": {"attn_layer": Gated},
    "registers": {"reg_tokens": 4},
    "registers, no class token": {"reg_tokens": 2, "class_token": False, "global_pool": "avg"},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "no_embed_class": {"reg_tokens": 4, "no_embed_class": True},
    "map pool": {"global_pool": "map", "class_token": False},
    "pre_norm": {"pre_norm": True, "init_values": 0.1},
    "rectangle": {"img_size": (48, 80)},
    "dynamic": {"dynamic_img_size": True},
    "distilled": {"cls": VisionTransformerDistilled},
}


@pytest.mark.cases(12)
@pytest.mark.parametrize("backend", ["auto", "reference", "eager", *TILES, "sdpa"])
@pytest.mark.parametrize("host", HOSTS)
def test_outputs_stay(host, backend):
    model = vit(**HOSTS[host]).eval()
    x = image(*HOSTS[host].get("img_size", ()))
    with torch.no_grad():
        before, slow = model(x), unfused(copy.deepcopy(model))(x)
        irpe.attach(model, QK if backend == "sdpa" else QKV, backend=backend)
        after = model(x)
        torch.testing.assert_close(after, before, rtol=1e-5, atol=2e-6)
        if backend == "reference":
            assert torch.equal(after, slow), "not bit-equal to timm's unfused path"
        assert (fill(model)(x) - before).abs().max() > 2e-4, "tables do not reach the output"


@pytest.mark.parametrize(
    "options",
    [
        {"attn_drop_rate": 0.3},
        {"proj_drop_rate": 0.3, "drop_path_rate": 0.3, "pos_drop_rate": 0.1},
        {"attn_drop_rate": 0.3, "qk_norm": True, "reg_tokens": 3},
        {"patch_drop_rate": 0.5},
        {"patch_drop_rate": 0.25, "attn_drop_rate": 0.3, "dynamic_img_size": True},
    ],
)
def test_training_stays_bit_for_bit(options):
    """The same seed drops the same things, in the same order, on the reference."""
    model = unfused(vit(**options)).train()
    other = copy.deepcopy(model)
    irpe.attach(other, QKV, backend="reference")
    torch.manual_seed(5)
    wanted = model(image())
    torch.manual_seed(5)
    found = other(image())
    assert torch.equal(found, wanted)
    wanted.square().sum().backward()
    found.square().sum().backward()
    theirs, ours = gradients(model), gradients(other)
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-5)


def test_state_dict_only_grows_and_report():
    model = vit(depth=3)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    count = sum(p.numel() for p in model.parameters())
    report = irpe.attach(model, "rpe-1.9-cross-ctx-0-qkv", where="*")
    after = model.state_dict()
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert set(after) - set(before) == set(report.keys) and len(report.keys) == 3 * 6
    assert sum(p.numel() for p in model.parameters()) - count == report.parameters
    assert report.parameters == 3 * 6 * 2 * 16 * 8  # blocks, tables, heads, head_dim, 7 + 1 buckets
    assert report.modules == ("blocks.0.attn", "blocks.1.attn", "blocks.2.attn")
    assert "blocks.0.attn" in str(report) and "rpe-1.9-cross-ctx-0-qkv" in str(report)


@pytest.mark.parametrize(
    ("where", "number"),
    [("*", 3), ("blocks.0.*", 1), ("blocks.[12].*", 2), ("blocks.2.attn", 1), ("*.attn", 3)],
)
def test_where(where, number):
    """Blocks without an encoding, between blocks with one, run as before."""
    model = vit(depth=3).eval()
    x = image()
    before = model(x)
    report = irpe.attach(model, K, where=where)
    assert len(report.modules) == number
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=2e-6)
    tokens = model.forward_features(x)
    fill(model)
    # All tokens: the class token's row is one bucket, which a softmax does not see.
    assert not torch.allclose(model.forward_features(x), tokens, atol=1e-3)
    seen = torch.ones(17, 17, dtype=torch.bool).tril()
    model.forward_features(x, attn_mask=seen)
    model.set_grad_checkpointing()
    model.train()(x).sum().backward()
    for path in report.modules:
        assert model.get_submodule(path).rpe_k.table.grad.abs().max() > 0


def test_a_second_attach_raises_and_changes_nothing():
    model = vit()
    irpe.attach(model, K)
    keys = list(model.state_dict())
    with pytest.raises(irpe.IrpeError, match="blocks.0.attn.*detach"):
        irpe.attach(model, QK)
    assert list(model.state_dict()) == keys
    model = vit(depth=3)
    irpe.attach(model, K, where="blocks.1.*")
    keys = list(model.state_dict())
    with pytest.raises(irpe.IrpeError, match="blocks.1.attn"):
        irpe.attach(model, K)
    assert list(model.state_dict()) == keys, "blocks.0 was changed before blocks.1 raised"


@pytest.mark.parametrize(
    ("make", "spec", "where", "says"),
    [
        (vit, K, "layers.*", "layers"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), K, "*", "RPEAttention"),
        (lambda: timm.create_model("resnet10t"), K, "*", "ResNet"),
        (lambda: vit(block_fn=DiffParallelScalingBlock), K, "*", "DiffParallelScalingBlock"),
        (vit, "rpe-1.9-prodct-ctx-1-k", "*", "prodct"),
    ],
)
def test_what_cannot_be_equipped_is_left_alone(make, spec, where, says):
    model = make()
    before = fingerprint(model)
    with pytest.raises(irpe.IrpeError, match=says):
        irpe.attach(model, spec, where=where)
    assert fingerprint(model) == before


def _through_oracle(model, x, grids, mask=None, is_causal=False, kept=None):
    """The first block's attention by loops, from what enters it."""
    attn = model.blocks[0].attn
    tokens = model.norm_pre(kept if kept is not None else model._pos_embed(model.patch_embed(x)))
    inside = model.blocks[0].norm1(tokens)
    B, L, C = inside.shape
    qkv = attn.qkv(inside).reshape(B, L, 3, 2, 16).permute(2, 0, 3, 1, 4)
    spec = irpe.parse(QKV)
    (function,) = plain.buckets(spec)
    names = [(on, getattr(attn, f"rpe_{on}").table, function) for on in "qkv"]
    out = truth.attention(*qkv.unbind(0), names, grids, grids, mask=mask, is_causal=is_causal)
    return attn.proj(out.transpose(1, 2).reshape(B, L, C))


def _first_attention(model, call):
    seen = []
    hook = model.blocks[0].attn.register_forward_hook(lambda m, i, o: seen.append(o))
    call()
    hook.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("options", "size", "grid", "prefix"),
    [
        ({"img_size": (48, 80)}, (48, 80), (3, 5), 1),
        ({"dynamic_img_size": True}, (32, 80), (2, 5), 1),
        ({"dynamic_img_size": True, "dynamic_img_pad": True}, (40, 50), (3, 4), 1),
        ({"reg_tokens": 4}, (64, 64), (4, 4), 5),
        ({"class_token": False, "global_pool": "avg"}, (64, 64), (4, 4), 0),
        ({"patch_size": (32, 16)}, (64, 64), (2, 4), 1),
    ],
)
def test_positions_come_from_the_patches(options, size, grid, prefix):
    model = vit(**options).double().eval()
    irpe.attach(model, QKV)
    fill(model)
    x = image(*size, batch=1).double()
    with torch.no_grad():
        found = _first_attention(model, lambda: model(x))
        wanted = _through_oracle(model, x, [plain.grid(*grid, prefix)])
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prefix", [0, 1])
def test_dropped_patches_keep_their_positions(prefix):
    options = {} if prefix else {"class_token": False, "global_pool": "avg"}
    model = vit(patch_drop_rate=0.5, img_size=(48, 80), **options).double().train()
    irpe.attach(model, QKV)
    fill(model)
    x = image(48, 80).double()
    with torch.no_grad():
        tokens = model._pos_embed(model.patch_embed(x))
        torch.manual_seed(4)
        inputs = []
        hook = model.patch_drop.register_forward_hook(lambda m, i, o: inputs.append(o))
        found = _first_attention(model, lambda: model(x))
        hook.remove()
        kept = inputs[0]
        # Each token that is left is found again among all of them, sample by sample.
        grids = []
        whole = plain.grid(3, 5, prefix)
        for b in range(2):
            places = [int((tokens[b] == t).all(-1).nonzero()) for t in kept[b]]
            assert len(set(places)) == len(places) < 15
            grids.append([whole[place] for place in places])
        assert grids[0] != grids[1]
        wanted = _through_oracle(model, x, grids, kept=kept)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    model.eval()
    assert model(x).isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "reference", "eager", *TILES])
@pytest.mark.parametrize("kind", ["mask", "float", "padding", "causal", "both"])
def test_masks_pass_through(kind, backend):
    model = vit().double().eval()
    irpe.attach(model, QKV, backend=backend)
    fill(model)
    x = image(batch=1).double()
    seen = torch.rand(17, 17) > 0.3
    seen[:, 0] = True
    mask = None
    if kind in ("mask", "both"):
        mask = seen
    elif kind == "float":
        mask = torch.randn(1, 2, 17, 17).double()
    elif kind == "padding":
        mask = seen[:1].expand(1, 1, 1, 17)
    causal = kind in ("causal", "both")
    full = None if mask is None else mask.expand(1, 2, 17, 17)
    with torch.no_grad():
        found = _first_attention(
            model, lambda: model.forward_features(x, attn_mask=mask, is_causal=causal)
        )
        wanted = _through_oracle(model, x, [plain.grid(4, 4, 1)], full, causal)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_ways_through_the_model():
    """Intermediate features, feature extraction and slices of the blocks see the same grid."""
    model = vit(depth=3, dynamic_img_size=True).eval()
    irpe.attach(model, QKV)
    fill(model)
    x = image(32, 64)
    with torch.no_grad():
        outputs = []
        hooks = [b.register_forward_hook(lambda m, i, o: outputs.append(o)) for b in model.blocks]
        final = model.forward_features(x)
        for hook in hooks:
            hook.remove()
        last, steps = model.forward_intermediates(x, output_fmt="NLC", return_prefix_tokens=True)
        torch.testing.assert_close(last, final)
        for (patches, prefix), wanted in zip(steps, outputs, strict=True):
            torch.testing.assert_close(torch.cat((prefix, patches), 1), wanted)
        layers = model.get_intermediate_layers(x, n=[0, 2], return_prefix_tokens=True)
        for (patches, prefix), wanted in zip(layers, (outputs[0], outputs[2]), strict=True):
            torch.testing.assert_close(torch.cat((prefix, patches), 1), wanted)
        early = model.forward_intermediates(
            x, indices=[0], stop_early=True, intermediates_only=True
        )
        assert early[0].shape == (2, 32, 2, 4)
        torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x))
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        for block in model.blocks[:2]:
            tokens = block(tokens)
        torch.testing.assert_close(tokens, outputs[1])


def test_prune_then_run():
    model = vit(depth=3).eval()
    irpe.attach(model, K)
    fill(model)
    wanted = model.forward_intermediates(image(), indices=[1], norm=False)[1][0]
    model.prune_intermediate_layers([1], prune_head=True)
    found = model.forward_intermediates(image(), indices=[1], norm=False)[1][0]
    torch.testing.assert_close(found, wanted)


def test_features_only():
    """timm's feature wrapper around an attached model, and attach on the wrapper."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, features_only=True).eval()
    with torch.no_grad():
        before = model(image())
        report = irpe.attach(model, K)
        assert len(report.modules) > 0
        for found, wanted in zip(model(image()), before, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        fill(model)
        assert not torch.allclose(model(image())[-1], before[-1], atol=1e-2)


def test_a_model_inside_a_model():
    student = nn.ModuleDict({"student": vit(), "teacher": vit(seed=1)})
    report = irpe.attach(student, K, where="student.*")
    assert report.modules == ("student.blocks.0.attn", "student.blocks.1.attn")
    assert not any("rpe" in n for n in student["teacher"].state_dict())
    student["student"](image())
    student["teacher"](image())


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("size", [(64, 64), (32, 80)])
@pytest.mark.parametrize(
    "spec", [K, QKV, "rpe-2.0-cross-ctx-0-qk", "rpe-2.0-euc-bias-0-k", *ON_GRIDS]
)
def test_models_deit_is_attach(spec, size, backend):
    """Same weights, same logits and gradients, through two independent libraries."""
    shape = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    other = DeiT(**shape, rpe=spec, backend=backend).double()
    model = vit(dynamic_img_size=True)
    irpe.attach(model, spec, backend=backend)
    fill(model).double()
    other.load_state_dict(model.state_dict())
    x = image(*size).double()
    # The two resize the absolute embedding alike, up to the rounding of the resize in float32.
    tolerance = 1e-10 if size == (64, 64) else 1e-5
    found, wanted = other(x), model(x)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    found.square().sum().backward()
    wanted.square().sum().backward()
    theirs = gradients(model)
    assert theirs.keys() == gradients(other).keys()
    for name, grad in gradients(other).items():
        torch.testing.assert_close(grad, theirs[name], rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("host", ["hybrid", "flexi grid", "set_input_size"])
def test_other_patch_embeddings(host):
    if host == "hybrid":
        model = timm.create_model("vit_tiny_r_s16_p8_224", img_size=64, num_classes=5).eval()
    else:
        model = vit().eval()
    irpe.attach(model, K)
    size = (64, 64)
    if host == "set_input_size":
        size = (32, 48)
        model.set_input_size(size)
    found = []
    attn = model.blocks[0].attn
    hook = attn.register_forward_pre_hook(
        lambda m, a, kw: found.append(geometry_of(m)), with_kwargs=True
    )
    assert model(image(*size)).isfinite().all()
    hook.remove()
    expected = {"hybrid": (2, 2), "flexi grid": (4, 4), "set_input_size": (2, 3)}[host]
    assert (found[0].height, found[0].width) == expected
