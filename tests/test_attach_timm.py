"""attach on every family of timm's models, by one table of small models.

The oracle of a family is timm itself: its own forward pass, in which the one call of
``scaled_dot_product_attention`` is answered by loops over positions that the table states.
"""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from families import (
    BIAS,
    FAMILIES,
    MIXED,
    QKV,
    Family,
    Loops,
    build,
    cosine,
    counted,
    eva,
    inputs,
    naflex,
    patches,
    row,
    run,
    unfused,
)  # fmt: skip
from hosting import fill, fingerprint, sum_of_passes
from oracles import buckets as plain
from test_attach import gradients
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from timm.models.swin_transformer_v2_cr import WindowMultiHeadAttention
from torch import nn

import irpe

EACH = pytest.mark.parametrize("name", FAMILIES)


@pytest.mark.cases(7)
@EACH
def test_outputs_stay_until_trained(name):
    family = FAMILIES[name]
    model = build(family)
    with torch.no_grad():
        before = run(model, family)
        slow = run(unfused(copy.deepcopy(model)), family)
        for backend in ("auto", "reference"):
            attached = copy.deepcopy(model)
            report = irpe.attach(attached, QKV, where=family.where, backend=backend)
            if backend == "reference":
                unfused(attached)  # attention without an encoding, unfused as in timm
            after = run(attached, family)
            torch.testing.assert_close(after, before, rtol=1e-5, atol=5e-6)
            if backend == "reference" and family.exact:
                assert torch.equal(after, slow), "not bit-equal to timm's unfused path"
        assert len(report.modules) == len(family.grids) and "stay" in str(report)
        assert (run(fill(attached), family) - before).abs().max() > 1e-3


def check_oracle(family, spec, own, monkeypatch):
    model = build(family).double()
    attached = copy.deepcopy(model)
    report = irpe.attach(attached, spec, where=family.where, native=own)
    fill(attached)
    found = run(attached, family)
    loops = Loops(spec, attached, report, family)
    for m in model.modules():
        if hasattr(m, "fused_attn"):
            m.fused_attn = True
    for unfused_only in (WindowAttentionV2, WindowMultiHeadAttention):
        monkeypatch.setattr(unfused_only, "forward", cosine)
    monkeypatch.setattr(F, "scaled_dot_product_attention", loops)
    wanted = run(model, family)
    assert loops.calls == len(family.grids)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.cases(5)
@EACH
@pytest.mark.parametrize("spec", [QKV, "rope-axial"])
def test_equals_the_host_with_attention_by_loops(name, spec, monkeypatch):
    with torch.no_grad():
        check_oracle(FAMILIES[name], spec, "keep", monkeypatch)


@EACH
def test_one_step_reaches_every_table(name):
    """Gradients too are those of timm's forward pass with tables of zeros."""
    family = FAMILIES[name]
    model = build(family).double().train()
    other = copy.deepcopy(model)
    irpe.attach(model, BIAS.replace("bias", "ctx").replace("-k", "-qkv"), where=family.where)
    for each in (model, other):
        torch.manual_seed(3)
        run(each, family).square().sum().backward()
    theirs, ours = gradients(other), gradients(model)
    for path, grad in theirs.items():
        torch.testing.assert_close(ours.pop(path), grad, rtol=1e-7, atol=1e-7, msg=path)
    assert ours
    for path, grad in ours.items():
        assert grad.abs().max() > 0, path


@pytest.mark.cases(8)
@EACH
def test_state_copies_and_detach(name):
    family = FAMILIES[name]
    model = build(family)
    before, state = fingerprint(model), list(model.state_dict())
    with torch.no_grad():
        output = run(model, family)
        report = irpe.attach(model, BIAS, where=family.where)
        changed = run(fill(model), family)
        assert set(model.state_dict()) - set(state) == set(report.keys)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(run(other, family), changed)
        fresh = build(family, seed=5)
        irpe.attach(fresh, BIAS, where=family.where)
        fresh.load_state_dict(model.state_dict())
        torch.testing.assert_close(run(fresh, family), changed, rtol=1e-5, atol=1e-6)
        with pytest.raises(irpe.IrpeError, match="encoding already"):
            irpe.attach(model, BIAS, where=family.where)
        irpe.detach(model)
        assert fingerprint(model) == before and list(model.state_dict()) == state
        assert torch.equal(run(model, family), output)
    with pytest.raises(irpe.IrpeError, match="where='nothing.*'"):
        irpe.attach(model, BIAS, where="nothing.*")
    assert fingerprint(model) == before


@EACH
def test_own_positions_are_replaced_if_told(name, monkeypatch):
    family = FAMILIES[name]
    model = build(family)
    if not family.has_own:
        with pytest.raises(irpe.IrpeError, match="native='replace'.*native='keep'"):
            irpe.attach(model, QKV, where=family.where, native="replace")
        return
    with torch.no_grad():
        before = run(model, family)
        report = irpe.attach(model, QKV, where=family.where, native="replace")
        assert "change at once" in str(report)
        after = run(model, family)
        assert (after - before).abs().max() > 1e-4
        for path, p in model.named_parameters():  # what is replaced does not count any more
            if any(part in path for part in ("rel_pos", "relative_position", "cpb_mlp", "rope")):
                nn.init.normal_(p)
        torch.testing.assert_close(run(model, family), after)
        irpe.attach(build(family), "rope-axial", where=family.where, native="replace")


# One of each way that positions take; the others with pytest -m slow.
COMPILED = ("dinov3", "beit", "relpos", "naflex image", "swin", "swin v2", "maxvit", "pit", "nest")


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    "name", [n if n in COMPILED else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]
)
def test_compiles_and_exports(name):
    family = FAMILIES[name]
    model = build(family)
    args, given = inputs(family)
    irpe.attach(model, QKV, where=family.where)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = counted(fill(model)(*args, **given), given)
        graph = family.given is None  # timm's own code breaks the graph there
        compiled = torch.compile(model, backend="aot_eager", fullgraph=graph)
        torch.testing.assert_close(
            counted(compiled(*args, **given), given), wanted, rtol=1e-4, atol=1e-5
        )
        if graph:
            exported = torch.export.export(model, args, given).module()
            found = counted(exported(*args, **given), given)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.cases(7)
@EACH
def test_checkpointed_blocks_know_their_own_grid(name):
    """Gradients with checkpointing are those without, another grid run in between where it can."""
    family = FAMILIES[name]
    model = build(family).double().train()
    irpe.attach(model, QKV, where=family.where)
    fill(model)
    torch.manual_seed(3)
    run(model, family).square().sum().backward()
    wanted = gradients(model)
    model.zero_grad()
    if name not in ("pit", "crossvit", "twins", "mobilevit"):  # they have no such thing
        model.set_grad_checkpointing()
    torch.manual_seed(3)
    out = run(model, family)
    run(model, family)
    out.square().sum().backward()
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for path, grad in wanted.items():
        torch.testing.assert_close(found[path], grad, rtol=1e-8, atol=1e-8, msg=path)


@pytest.mark.parametrize("name", ["eva", "naflex"])
def test_dropped_patches_keep_their_positions(name, monkeypatch):
    if name == "eva":
        family = Family(eva(patch_drop_rate=0.5), row(1))
        whole = [plain.grid(2, 3)] * 2
    else:
        family = Family(naflex(patch_drop_rate=0.5, class_token=False), row(1), given=patches)
        whole = [places[1:] for places in MIXED]
    model = build(family).double().train()
    attached = copy.deepcopy(model)
    report = irpe.attach(attached, QKV)
    fill(attached)
    args, given = inputs(family, torch.float64)
    loops = Loops(QKV, attached, report, family)

    def kept(module, inputs, output):
        pairs = zip(whole, output[1], strict=True)
        loops.grids = [[[None, *(places[i] for i in row)] for places, row in pairs]] * 2

    with torch.no_grad():
        torch.manual_seed(4)
        found = attached.forward_features(*args, **given)
        model.patch_drop.register_forward_hook(kept)
        for m in model.modules():
            if hasattr(m, "fused_attn"):
                m.fused_attn = True
        monkeypatch.setattr(F, "scaled_dot_product_attention", loops)
        torch.manual_seed(4)
        wanted = model.forward_features(*args, **given)
    assert loops.grids[0][0] != loops.grids[0][1] and len(loops.grids[0][0]) == 4
    if name == "naflex":
        valid = F.pad(wanted["patch_valid"], (1, 0), value=True)
        found, wanted = found["patches"][valid], wanted["patches"][valid]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["dinov3", "naflex image"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_grids_before_one_backward(name, checkpointing):
    """Multi-crop: gradients are those of separate backward passes (2x3 and 3x2 have one length)."""
    model = build(FAMILIES[name]).double().train()
    irpe.attach(model, QKV)
    fill(model)
    crops = [torch.randn(2, 3, *size, dtype=torch.float64) for size in ((32, 48), (48, 32))]
    runs = [lambda x=x: model.forward_features(x) for x in crops]
    sum_of_passes(model, runs, lambda: model.set_grad_checkpointing(checkpointing))


@pytest.mark.parametrize("name", ["swin", "relpos", "crossvit"])
def test_heads_that_an_encoding_cannot_have(name):
    """Said before anything is changed, also where only a later module is of that width."""
    family = FAMILIES[name]
    changed = {"embed_dim": (16, 12)} if name == "crossvit" else {"embed_dim": 12}
    model = family.make(**changed)
    before = fingerprint(model)
    with pytest.raises(irpe.IrpeError, match="does not support .*: rope-axial.* of 4, not 6"):
        irpe.attach(model, "rope-axial")
    assert fingerprint(model) == before


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", ["vit", "eva", "beit", "maxvit", "nest"])
def test_compiled_checkpointed_blocks(name):
    family = FAMILIES[name]
    model = build(family)
    irpe.attach(model, QKV)
    fill(model).train().set_grad_checkpointing()
    (x,), _ = inputs(family)
    model.forward_features(x).square().sum().backward()
    wanted = gradients(model)
    model.zero_grad()
    whole = name != "nest"  # see irpe/hosts/timm/maps.py
    compiled = torch.compile(model.forward_features, backend="aot_eager", fullgraph=whole)
    compiled(x).square().sum().backward()
    for path, grad in gradients(model).items():
        torch.testing.assert_close(grad, wanted[path], rtol=1e-3, atol=1e-3, msg=path)
