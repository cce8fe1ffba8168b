"""An attached model is an ordinary model: removal, maps, parametrisations, unused parameters."""

import copy

import pytest
import test_attach_torch as torchs
import torch
from families import FAMILIES, build, inputs, run
from hosting import QKV, everything, fill
from test_attach import vit
from timm.utils import AttentionExtract
from torch import nn

import irpe

RPE = "rpe-1.9-product-ctx-1-k"


def torchvision():
    return torchs.vit(0), torchs.on_image


def encoder():
    return torchs.encoder(0), torchs.on_tokens


def transformers():
    models = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = models.ViTMAEConfig(**sizes, intermediate_size=48, image_size=64)
    x = torch.randn(2, 3, 64, 64)
    noise = torch.rand(2, 16)
    return models.ViTMAEModel(config), lambda m: m(x, noise=noise).last_hidden_state


def family(name):
    return lambda: (build(FAMILIES[name]), lambda m: run(m, FAMILIES[name]))


def dropping():
    x = torch.randn(2, 3, 64, 64)
    return vit(patch_drop_rate=0.5), lambda m: m(x)


HOSTS = {
    "torchvision": torchvision,
    "encoder": encoder,
    "transformers": transformers,
    "patch dropout": dropping,
    **{name: family(name) for name in ("vit", "rope-vit mixed", "beit", "relpos", "swin v2",
                                       "crossvit", "pit", "naflex image", "maxvit", "nest")},
}  # fmt: skip


@pytest.mark.cases(3)
@pytest.mark.parametrize("name", HOSTS)
def test_detach_restores_every_attribute(name):
    model, call = HOSTS[name]()
    before = everything(model)
    native = "replace" if FAMILIES.get(name) is not None and FAMILIES[name].has_own else "keep"
    with irpe.located(torchs.GRID):
        irpe.attach(model, RPE, native=native)
    call(model)
    assert everything(model) != before
    irpe.detach(model)
    assert everything(model) == before


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.has_own])
def test_replaced_encodings_leave_no_parameter_unused(name):
    """Then DistributedDataParallel trains with its defaults."""
    case = FAMILIES[name]
    model = build(case).train()
    before = {n for n, p in model.named_parameters() if p.requires_grad}
    run(model, case).square().sum().backward()
    unused = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    model.zero_grad()
    irpe.attach(model, RPE, where=case.where, native="replace")
    run(model, case).square().sum().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in trained.items() if p.grad is None} <= unused
    irpe.detach(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == before


def test_a_shared_bias_is_frozen_with_the_last_block_that_uses_it():
    model = build(FAMILIES["beit, shared bias"])
    irpe.attach(model, RPE, where="blocks.0.*", native="replace")
    assert all(p.requires_grad for p in model.rel_pos_bias.parameters())
    irpe.attach(model, RPE, where="blocks.1.*", native="replace")
    assert not any(p.requires_grad for p in model.rel_pos_bias.parameters())


def wrapped(attention):
    nn.utils.parametrizations.spectral_norm(attention, "in_proj_weight")
    nn.utils.parametrizations.weight_norm(attention.out_proj)


@pytest.mark.parametrize("first", ["attach", "parametrise"])
def test_parametrisations_stay(first):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    plain = copy.deepcopy(attention)
    x, grid = torch.randn(1, 6, 16), irpe.Grid(2, 3)
    steps = [wrapped, lambda a: irpe.attach(a, RPE)]
    for step in steps if first == "parametrise" else steps[::-1]:
        torch.manual_seed(1)
        step(attention)
    torch.manual_seed(1)
    wrapped(plain)
    with irpe.located(grid):
        torch.testing.assert_close(attention(x, x, x), plain(x, x, x))
    attention._reset_parameters()
    other = copy.deepcopy(attention)
    irpe.detach(attention)
    assert attention.state_dict().keys() == plain.state_dict().keys()
    attention(x, x, x)
    nn.utils.parametrize.remove_parametrizations(attention, "in_proj_weight")
    assert type(attention) is nn.MultiheadAttention
    with irpe.located(grid):
        other(x, x, x)


def test_a_patch_embedding_without_a_grid_is_refused():
    class Stem(nn.Module):
        num_patches = 16

        def __init__(self, embed_dim=32, **given):
            super().__init__()
            self.proj = nn.Conv2d(3, embed_dim, 16, 16)

        def forward(self, x):
            return self.proj(x).flatten(2).transpose(1, 2)

    model = vit(embed_layer=Stem)
    before = everything(model)
    with pytest.raises(irpe.IrpeError, match=r"Stem is not known.*dynamic_feat_size"):
        irpe.attach(model, RPE)
    assert everything(model) == before
    Stem.dynamic_feat_size = lambda self, size: (size[0] // 16, size[1] // 16)
    irpe.attach(model, RPE)
    model(torch.randn(1, 3, 64, 64))


def maps_of(q, k, encodings, geometry, scale):
    """Softmax of the logits, by one call of attention for each one-hot value."""
    q, k = encodings.transform(q, k, geometry)
    eye = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)
    terms = [term for term in encodings.terms(geometry) if term.kind != "value"]
    return irpe.attention(q, k, eye, terms, scale=scale, backend="reference")


def test_attention_maps_of_timm():
    """The hook of AttentionExtract, hooks on attn_drop, and irpe.attention_maps are alike."""
    model = vit().eval()
    irpe.attach(model, QKV)
    fill(model)
    x = torch.randn(2, 3, 64, 64)
    wanted = model(x)
    own = irpe.attention_maps(model.train(), x)
    assert model.training and not model.eval().training
    for block in model.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    extracted = AttentionExtract(model, method="hook")(x)
    assert list(own) == ["blocks.0.attn", "blocks.1.attn"] and len(extracted) == 2
    for mine, timms in zip(own.values(), extracted.values(), strict=True):
        torch.testing.assert_close(mine, timms)
    attn = model.blocks[0].attn
    x = model.blocks[0].norm1(model.norm_pre(model._pos_embed(model.patch_embed(x))))
    q, k, _ = attn.qkv(x).view(2, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
    truth = maps_of(q, k, irpe.encodings_of(attn), irpe.Grid(4, 4, prefix=1), 0.25)
    torch.testing.assert_close(own["blocks.0.attn"], truth)


@pytest.mark.parametrize("name", ["torchvision", "encoder", "transformers", "swin v2", "nest"])
def test_attention_maps_of_others(name):
    model, call = HOSTS[name]()
    with irpe.located(torchs.GRID):
        irpe.attach(model, QKV)
    fill(model)
    args = []
    hook = model.register_forward_pre_hook(lambda m, a, k: args.append((a, k)), with_kwargs=True)
    call(model)
    hook.remove()
    (images,), options = args[0] if args else inputs(FAMILIES[name])
    with irpe.located(torchs.GRID):
        found = irpe.attention_maps(model, images, **options)
    assert list(found) == list(irpe.specs(model))
    for weights in found.values():
        assert weights.dim() == 4
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    with pytest.raises(irpe.IrpeError, match="nothing is attached"):
        irpe.attention_maps(nn.Linear(2, 2), images)


@pytest.mark.parametrize("name", ["torchvision", "vit"])
def test_fx_is_refused_in_one_line(name):
    model, _ = HOSTS[name]()
    irpe.attach(model, RPE)
    with pytest.raises(irpe.IrpeError, match=r"torch\.fx cannot trace.*irpe\.attention_maps"):
        torch.fx.symbolic_trace(model)


@pytest.mark.parametrize("kdim", [16, 24])
def test_cross_attention_between_two_grids(kdim):
    """Queries and keys on grids of their own, against the tables applied by hand."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 2, kdim=kdim, vdim=kdim, batch_first=True).double()
    irpe.attach(module, QKV)
    fill(module)
    places = [irpe.Grid(*size).positions(torch.device("cpu"))[0] for size in ((2, 3), (3, 4))]
    geometry = irpe.Geometry(*places)
    query, memory = torch.randn(2, 6, 16).double(), torch.randn(2, 12, kdim).double()
    with irpe.located(geometry):
        found, _ = module(query, memory, memory)
        with pytest.raises(irpe.IrpeError, match="L=6 and S=6.*where="):
            module(query, query if kdim == 16 else memory[:, :6], memory[:, :6])
    weights = module.in_proj_weight
    weights = weights.chunk(3) if kdim == 16 else [
        getattr(module, f"{name}_proj_weight") for name in "qkv"
    ]  # fmt: skip
    sides = zip((query, memory, memory), weights, module.in_proj_bias.chunk(3), strict=True)
    q, k, v = (nn.functional.linear(*each).unflatten(-1, (2, 8)).transpose(1, 2) for each in sides)
    from oracles import attention as truth
    from oracles import buckets as plain

    (function,) = plain.buckets(irpe.parse(QKV))
    tables = [(on, getattr(module, f"rpe_{on}").table, function) for on in "qkv"]
    grids = [[[tuple(p) for p in one.tolist()]] * 2 for one in places]
    wanted = truth.attention(q, k, v, tables, *grids)
    wanted = module.out_proj(wanted.transpose(1, 2).flatten(2))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_patterns_and_sums():
    model = vit(depth=3).eval()
    both = f"rope-axial + {RPE}"
    report = irpe.attach(model, {"blocks.0.*": both, "blocks.[01].*": "rope-axial"})
    wanted = {"blocks.0.attn": both, "blocks.1.attn": "rope-axial"}
    assert report.specs == irpe.specs(model) == wanted
    assert all(spec in str(report) for spec in wanted.values())
    model(torch.randn(1, 3, 64, 64)).sum().backward()
    assert model.blocks[0].attn.rpe_k.table.grad.abs().max() > 0
    with pytest.raises(irpe.IrpeError, match=r"blocks\.0\.attn.*'rope-axial \+ "):
        irpe.attach(model, RPE)
    irpe.detach(model)
    assert irpe.specs(model) == {}


class Toy(nn.Module):
    """Attention of somebody else's library."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def heads(self, x):
        return self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(*self.heads(x)).transpose(1, 2).flatten(2)


class AttachedToy(Toy):
    def forward(self, x):
        encodings, geometry = irpe.encodings_of(self), irpe.Sequence(x.shape[1])
        q, k, v = self.heads(x)
        q, k = encodings.transform(q, k, geometry)
        out = irpe.attention(q, k, v, encodings.terms(geometry))
        return out.transpose(1, 2).flatten(2)


class ToySite(irpe.Site):
    kind, axes = AttachedToy, 1

    def sizes(self):
        return {"dim": 16, "num_heads": 2}


def test_a_library_of_ones_own(monkeypatch):
    from irpe.hosts import base

    monkeypatch.setattr(base, "_LIBRARIES", list(base._LIBRARIES))
    irpe.register_host(
        __name__,
        lambda model: [ToySite(n, m) for n, m in model.named_modules() if isinstance(m, Toy)],
    )
    model, x = nn.Sequential(Toy(), Toy()), torch.randn(2, 5, 16)
    before, wanted = everything(model), model(x)
    report = irpe.attach(model, {"0": "t5,buckets=8,max=20"})
    assert report.modules == ("0",) and report.parameters == 16
    torch.testing.assert_close(model(x), wanted)
    nn.init.normal_(model[0].t5.table)
    assert not torch.allclose(model(x), wanted, atol=1e-3)
    with pytest.raises(irpe.IrpeError, match="rope-axial.*two axes"):
        irpe.attach(model, {"1": "rope-axial"})
    irpe.detach(model)
    assert everything(model) == before and torch.equal(model(x), wanted)
    with pytest.raises(irpe.IrpeError, match="native='replace', but 0 has no native"):
        irpe.attach(model, "rope", native="replace")
    with pytest.raises(irpe.IrpeError, match="register_host takes"):
        irpe.register_host("timm", None)
