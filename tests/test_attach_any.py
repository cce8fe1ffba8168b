"""attach with encodings other than image tables: rotary ones, ALiBi, and texts in torch's own."""

import copy
import pickle

import pytest
import torch
from hosting import fingerprint
from test_attach import ON_GRIDS, image, vit
from torch import nn

import irpe
from irpe.hosts.carry import geometry_of

ON_TEXTS = ("rope", "alibi", "shaw,clip=3,on=kv", "huang4,clip=3", "t5,buckets=8,max=20", "pia")


@pytest.mark.parametrize(
    "options", [{}, {"reg_tokens": 4}, {"class_token": False, "global_pool": "avg"}]
)
@pytest.mark.parametrize("spec", ON_GRIDS)
def test_report_detach_and_copies(spec, options):
    model = vit(**options, qk_norm=True).eval()
    before, state = fingerprint(model), list(model.state_dict())
    output = model(image())
    report = irpe.attach(model, spec)
    assert set(report.specs.values()) == {str(irpe.parse(spec))} and len(report.modules) == 2
    assert report.parameters == (2 * 2 * 2 * 8 if spec == "rope-mixed" else 0)
    assert spec in str(report) and "change at once" in str(report)
    changed = model(image())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(image()), changed)
    irpe.detach(model)
    assert fingerprint(model) == before and list(model.state_dict()) == state
    assert torch.equal(model(image()), output)


@pytest.mark.parametrize("spec", ON_GRIDS)
def test_dropped_patches_keep_their_positions(spec):
    """What drops out is told by the grid: the others turn by their own places."""
    model = vit(patch_drop_rate=0.5).train()
    irpe.attach(model, spec)
    grids = []
    model.blocks[0].attn.register_forward_pre_hook(
        lambda m, a, kw: grids.append((a[0], geometry_of(m))), with_kwargs=True
    )
    outs = []
    model.blocks[0].attn.register_forward_hook(lambda m, a, out: outs.append(out))
    model(image())
    (x, grid), found = grids[0], outs[0]
    attn = model.blocks[0].attn
    for b in range(2):  # one sample at a time, at the places it kept
        one = irpe.Grid(4, 4, prefix=1, positions=grid.positions(x.device)[0][b])
        layer = irpe.RPEAttention(32, 2, spec, prefix=1)
        layer.load_state_dict(attn.state_dict())
        torch.testing.assert_close(layer(x[b : b + 1], one), found[b : b + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("rope", "one axis.*row, column"),
        ("shaw,clip=8", "one axis"),
        ("t5,buckets=32,max=128", "one axis"),
        ("pia", "one axis"),
        ("learned,length=512", "input"),
        ("sinusoidal", "input"),
    ],
)
def test_what_makes_no_sense_on_a_grid_is_refused(spec, says):
    model = vit()
    before = fingerprint(model)
    with pytest.raises(irpe.IrpeError, match=f"support blocks.0.attn: {spec}.*{says}"):
        irpe.attach(model, spec)
    assert fingerprint(model) == before


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("spec", ON_TEXTS)
def test_torchs_attention_on_a_text(spec, causal):
    """nn.MultiheadAttention inside irpe.located(irpe.Sequence(...)) is irpe's layer."""
    theirs = nn.MultiheadAttention(24, 3, batch_first=True, dtype=torch.float64)
    plain = copy.deepcopy(theirs)
    irpe.attach(theirs, spec)
    layer = irpe.RPEAttention(24, 3, spec, prefix=0, dtype=torch.float64)
    layer.causal = causal  # tables are the same; torch's is told by its mask alone
    for name, p in theirs.named_parameters():
        if "table" in name:
            nn.init.normal_(p)
    state = theirs.state_dict()
    names = {"in_proj_weight": "qkv.weight", "in_proj_bias": "qkv.bias"}
    layer.load_state_dict(
        {names.get(n, n.replace("out_proj", "proj")): p for n, p in state.items()}
    )
    x, geometry = torch.randn(2, 9, 24, dtype=torch.float64), irpe.Sequence(9)
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1) if causal else None
    with irpe.located(geometry):
        found, chances = theirs(x, x, x, attn_mask=hidden, average_attn_weights=False)
    torch.testing.assert_close(found, layer(x, geometry), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(chances.sum(-1), torch.ones_like(chances[..., 0]))
    if "kv" not in spec:
        v = (x @ theirs.in_proj_weight[48:].T + theirs.in_proj_bias[48:]).view(2, 9, 3, 8)
        mixed = torch.einsum("bhls,bshd->blhd", chances, v).flatten(2)
        torch.testing.assert_close(theirs.out_proj(mixed), found)
    irpe.detach(theirs)
    assert torch.equal(theirs(x, x, x)[0], plain(x, x, x)[0])
    assert theirs.state_dict().keys() == plain.state_dict().keys()


def test_torchs_attention_refuses_what_belongs_at_the_input():
    model = nn.MultiheadAttention(24, 3)
    with pytest.raises(irpe.IrpeError, match="learned,length=512 is added.*input"):
        irpe.attach(model, "learned")
    irpe.attach(model, "rope-axial")
    x = torch.randn(6, 2, 24)
    with pytest.raises(irpe.IrpeError, match="of 2 or 3 numbers"), irpe.located(irpe.Sequence(6)):
        model(x, x, x)
    with irpe.located(irpe.Grid(2, 3)):
        assert model(x, x, x)[0].shape == x.shape
