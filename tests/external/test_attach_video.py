"""attach on the video encoders of Hugging Face's transformers: VideoMAE, ViViT, TimeSformer."""

import hosting
import pytest
import torch
from hosting import CHECKS, QKV, fill
from oracles import buckets as plain
from torch import nn

import irpe

transformers = pytest.importorskip("transformers", reason='needs pip install -e ".[test]"')

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "num_frames": 4, "image_size": (32, 48), "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
SQUARE = {**SMALL, "image_size": 48, "patch_size": 16}  # what TimeSformer's layers can count
OLD = transformers.__version__.startswith("4")
# transformers 4 takes squares only.
VIVIT = {**SMALL, "image_size": 48 if OLD else (32, 48), "tubelet_size": [2, 16, 16]}
# Name, options, prefix tokens of the attention that is tested
FAMILIES = {
    "VideoMAE": ("VideoMAE", {**SMALL, "patch_size": 16, "tubelet_size": 2}, 0),
    "ViViT": ("Vivit", VIVIT, 1),
    "joint": ("Timesformer", {**SQUARE, "attention_type": "joint_space_time"}, 1),
    "divided": ("Timesformer", {**SQUARE, "attention_type": "divided_space_time"}, 1),
    "space": ("Timesformer", {**SQUARE, "attention_type": "space_only"}, 1),
}


def build(family, seed=0):
    torch.manual_seed(seed)
    name, options, _ = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, f"{name}Model")(config).double().train()
    for path, p in model.named_parameters():
        if p.dim() == 2 and ("query" in path or "key" in path or "proj" in path or "qkv" in path):
            nn.init.normal_(p, std=0.25)
        elif not p.any() or p.dim() == 1:
            nn.init.normal_(p, mean=float("norm" in path and "bias" not in path), std=0.2)
    return model


def video(height=32, width=48, frames=4):
    torch.manual_seed(2)
    return torch.randn(2, frames, 3, height, width, dtype=torch.float64)


def size_of(model):
    side = model.config.image_size
    return (side, side) if isinstance(side, int) else side


def run(model, *size):
    return model(pixel_values=video(*(size or size_of(model)))).last_hidden_state


def attach(model, spec, **given):
    """On all attention but that over frames alone, which has one axis."""
    return irpe.attach(model, spec, where="*layer*.[01].attention*", **given)


def attention_of(model):
    return [m for m in model.modules() if getattr(m, "rpe_k", None) is not None][-1]


def projected(module, x):
    if hasattr(module, "qkv"):
        return module.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
    names = ("q_proj", "k_proj", "v_proj") if hasattr(module, "q_proj") else (
        "query", "key", "value")  # fmt: skip
    q, k, v = (getattr(module, name)(x) for name in names)
    if hasattr(module, "q_bias"):  # VideoMAE of transformers 4 adds them itself
        q, v = q + module.q_bias, v + module.v_bias
    return [y.unflatten(2, (2, 16)).transpose(1, 2) for y in (q, k, v)]


@pytest.mark.cases(1)
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "space"])
def test_attached(family, check):
    getattr(hosting, check)(lambda seed: build(family, seed), run, attach=attach)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_by_loops(family):
    """Tubelets are counted from the model: 4 pictures are 2 frames for VideoMAE and ViViT."""
    model = build(family).eval()
    attach(model, QKV)
    fill(model)
    module, prefix = attention_of(model), FAMILIES[family][2]
    x, _, (found, *_) = hosting.seen_by(module, lambda: run(model))
    places = plain.volume(2, *(side // 16 for side in size_of(model)))
    if family == "joint":  # frame by frame in each patch
        places = sorted(plain.volume(4, 3, 3), key=lambda place: place[1:])
    elif family in ("divided", "space"):
        places = plain.grid(3, 3)
    assert x.shape[1] == prefix + len(places)
    sample = x[:2]
    out = getattr(module, "o_proj", nn.Identity())
    wanted = hosting.by_loops(
        module, projected(module, sample), out, [[None] * prefix + places] * 2
    )
    torch.testing.assert_close(found[:2], wanted, rtol=1e-10, atol=1e-10)


def test_attention_over_frames_has_one_axis():
    model = build("divided").eval()
    plainly = run(model)
    with pytest.raises(irpe.IrpeError, match=r"temporal attention is over frames.*rope"):
        irpe.attach(model, QKV)
    irpe.attach(model, {"*temporal_attention*": "rope", "*": "rope-axial"})
    assert irpe.specs(model)["encoder.layer.0.temporal_attention.attention"] == "rope"
    module = model.encoder.layer[1].temporal_attention.attention
    x, _, (found,) = hosting.seen_by(module, lambda: run(model))
    assert x.shape == (18, 4, 32)
    q, k, v = projected(module, x)
    q, k = irpe.build("rope", dim=32, num_heads=2)["rope"].transform(q, k, irpe.Sequence(4))
    wanted = irpe.attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(run(model), plainly, atol=1e-3)
    irpe.detach(model)
    irpe.attach(model, "alibi")  # on one, two and three axes
    run(model)


def test_masked_patches_keep_their_places():
    model = build("VideoMAE").eval()
    attach(model, QKV)
    fill(model)
    masked = torch.ones(2, 12, dtype=torch.bool)
    kept = [[0, 3, 7, 11], [2, 5, 6, 8]]
    for row, places in zip(masked, kept, strict=True):
        row[places] = False
    module = attention_of(model)
    x, _, (found, _) = hosting.seen_by(module, lambda: model(video(), bool_masked_pos=masked))
    whole = plain.volume(2, 2, 3)
    places = [[whole[i] for i in row] for row in kept]
    wanted = hosting.by_loops(module, projected(module, x), nn.Identity(), places)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_two_grids_before_one_backward():
    model = build("joint")
    attach(model, QKV)
    fill(model)
    runs = [lambda size=size: run(model, *size) for size in ((32, 48), (48, 32))]
    hosting.sum_of_passes(model, runs)


@pytest.mark.parametrize("family", ["VideoMAE", "joint"])
def test_probabilities(family):
    model = build(family).eval()
    attach(model, QKV)
    maps = irpe.attention_maps(fill(model), video(48, 48) if family == "joint" else video())
    for found in maps.values():
        torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))
    if family == "joint":
        given = model(pixel_values=video(48, 48), output_attentions=True).attentions
        torch.testing.assert_close(given[0], next(iter(maps.values())))


@pytest.mark.parametrize("spec", ["rope-axial", "rope-mixed", "alibi", "rpe-1.9-cross-bias-0-k"])
def test_other_encodings_train(spec):
    model = transformers.VivitModel(transformers.VivitConfig(**{**VIVIT, "hidden_size": 48}))
    irpe.attach(model, spec)
    model(video(*size_of(model)).float()).last_hidden_state.square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None or "pooler" in name, name
