"""attach on nn.MultiheadAttention, against the written-out DETR encoder and torch itself."""

import copy
import pickle

import pytest
import torch
from torch import nn

import irpe
from models.detr.attention import MultiheadAttention

K, QKV, BIAS = "rpe-2.0-product-ctx-1-k", "rpe-2.0-cross-ctx-0-qkv", "rpe-1.9-product-bias-0-k"
GRID = irpe.Grid(3, 5)
B, L, C, H = 2, 15, 24, 3


def host(**given):
    return nn.MultiheadAttention(C, H, dtype=torch.float64, **given)


def fill(model):
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lookup_table" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def tokens():
    torch.manual_seed(1)
    x, pos = torch.randn(2, B, L, C, dtype=torch.float64)
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[1, 10:] = True
    return x, x + pos, padding


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_fresh_tables_change_nothing(batch_first, bias):
    plain = host(batch_first=batch_first, bias=bias)
    attached = copy.deepcopy(plain)
    report = irpe.attach(attached, QKV, backend="reference")
    assert report.modules == ("",) and len(report.keys) == 6
    x, placed, padding = tokens()
    given = [t if batch_first else t.transpose(0, 1) for t in (placed, placed, x)]
    additive = torch.randn(B * H, L, L, dtype=torch.float64)
    blocked = torch.rand(L, L) > 0.8
    blocked.fill_diagonal_(False)
    for masks in (
        {},
        {"key_padding_mask": padding},
        {"attn_mask": additive},
        {"attn_mask": blocked},
        {"attn_mask": blocked, "key_padding_mask": padding},
        {"attn_mask": additive[0], "key_padding_mask": padding},
    ):
        if masks.keys() >= {"attn_mask", "key_padding_mask"}:
            masks["attn_mask"] = masks["attn_mask"].clone()
            masks["attn_mask"][:, 0] = False if masks["attn_mask"].dtype == torch.bool else 0.0
        for average in (False, True):
            with irpe.located(GRID):
                found = attached(*given, average_attn_weights=average, **masks)
            wanted = plain(*given, average_attn_weights=average, **masks)
            torch.testing.assert_close(found, wanted)
        with irpe.located(GRID):
            assert attached(*given, need_weights=False, **masks)[1] is None


@pytest.mark.parametrize("spec", [K, QKV, BIAS])
def test_terms_are_the_encoders(spec):
    ours = fill(MultiheadAttention(C, H, rpe=spec).double())
    theirs = host()
    irpe.attach(theirs, spec)
    theirs.load_state_dict(ours.state_dict())
    x, placed, padding = tokens()
    wanted = ours(placed, placed, x, ~padding, GRID)
    weight = torch.randn_like(wanted)
    (wanted * weight).sum().backward()
    turned = [t.transpose(0, 1) for t in (placed, placed, x)]
    with irpe.located(GRID):
        found, chances = theirs(*turned, key_padding_mask=padding, average_attn_weights=False)
    torch.testing.assert_close(found.transpose(0, 1), wanted)
    (found.transpose(0, 1) * weight).sum().backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(theirs.get_parameter(name).grad, parameter.grad)
    torch.testing.assert_close(chances.sum(-1), torch.ones_like(chances[..., 0]))
    assert not chances[1, :, :, 10:].any()
    if spec != QKV:  # without a value term the probabilities give the output
        v = (x @ theirs.in_proj_weight[2 * C :].T + theirs.in_proj_bias[2 * C :]).unflatten(
            2, (H, -1)
        )
        mixed = torch.einsum("bhls,bshd->blhd", chances, v).flatten(2)
        torch.testing.assert_close(theirs.out_proj(mixed), wanted)


def test_an_image_alone_and_copies():
    model = host()
    irpe.attach(model, K)
    fill(model)
    x, placed, padding = tokens()
    with irpe.located(GRID):
        found, chances = model(placed[1], placed[1], x[1], key_padding_mask=padding[1])
        turned = [t[1:].transpose(0, 1) for t in (placed, placed, x)]
        wanted = model(*turned, key_padding_mask=padding[1:])
        torch.testing.assert_close(found, wanted[0][:, 0])
        torch.testing.assert_close(chances, wanted[1][0])
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(
                other(placed[1], placed[1], x[1], key_padding_mask=padding[1])[0], found
            )


def test_weights_in_training_are_those_of_the_output():
    model, (x, _, _) = host(batch_first=True, dropout=0.5), tokens()
    irpe.attach(model, K)
    with irpe.located(GRID):
        out, weights = model(x, x, x, average_attn_weights=False)
    v = nn.functional.linear(x, model.in_proj_weight[-C:], model.in_proj_bias[-C:])
    mixed = (weights @ v.unflatten(-1, (H, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, model.out_proj(mixed))
    assert 0.3 < (weights == 0).double().mean() < 0.7


@pytest.mark.parametrize(
    ("masks", "says"),
    [
        ({"key_padding_mask": torch.zeros(B, L, dtype=torch.int64)}, "key_padding_mask.*int64"),
        ({"attn_mask": torch.zeros(L, L, dtype=torch.uint8)}, "attn_mask.*uint8"),
        ({"key_padding_mask": torch.zeros(B, L - 1)}, r"\[2, 14\], not \[2, 15\]"),
        ({"attn_mask": torch.zeros(B, L, L)}, r"\[2, 15, 15\], not \[15, 15\] or \[6, 15, 15\]"),
    ],
)
def test_masks_that_torch_refuses(masks, says):
    model, (x, _, _) = host(batch_first=True), tokens()
    irpe.attach(model, K)
    with irpe.located(GRID), pytest.raises(irpe.IrpeError, match=says):
        model(x, x, x, **masks)


def test_what_cannot_be_equipped():
    whole = nn.Transformer(C, H, 1, 1, 32)
    assert irpe.attach(whole, K, where="encoder.*").modules == ("encoder.layers.0.self_attn",)
    image, queries = torch.zeros(L, 1, C), torch.zeros(4, 1, C)
    with irpe.located(GRID):
        whole(image, queries)
        irpe.attach(whole, K, where="decoder.*")
        with pytest.raises(irpe.IrpeError, match="L=4 and S=4 tokens: attach with where="):
            whole(image, queries)
    with pytest.raises(irpe.IrpeError, match="without a position"):
        irpe.attach(nn.MultiheadAttention(C, H, add_bias_kv=True), K)
    model = host()
    irpe.attach(model, K)
    x, _, _ = tokens()
    with pytest.raises(irpe.IrpeError, match="irpe.located"):
        model(x, x, x)
    with pytest.raises(irpe.IrpeError, match="15 queries"), irpe.located(GRID):
        model(x, x, x)  # sequence first: two tokens
    with pytest.raises(irpe.IrpeError, match="encoding already"):
        irpe.attach(model, K)
    with pytest.raises(irpe.IrpeError, match="not a geometry"), irpe.located((3, 5)):
        pass
