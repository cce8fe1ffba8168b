"""attach on the image encoders of Hugging Face's transformers, 4.57.6 as well as 5.

Skipped where it is absent: version 5 is in the extra ``test``, 4.57.6 in ``oracles``.
"""

import copy

import hosting
import pytest
import torch
from hosting import CHECKS, QK, QKV, fill
from oracles.buckets import grid
from torch import nn

import irpe

transformers = pytest.importorskip("transformers", reason='needs pip install -e ".[test]"')

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "image_size": 64, "patch_size": 16, "hidden_dropout_prob": 0.0,
}  # fmt: skip
# Name, options, prefix tokens
FAMILIES = {
    "ViT": ({}, 1),
    "DeiT": ({}, 2),
    "Dinov2": ({"mlp_ratio": 2}, 1),
    "Dinov2WithRegisters": ({"mlp_ratio": 2, "num_register_tokens": 3}, 4),
    "CLIPVision": ({}, 1),
    "SiglipVision": ({}, 0),
    "ViTMAE": ({"mask_ratio": 0.5}, 1),
    "ViTMSN": ({}, 1),
    "IJepa": ({}, 0),
    "DINOv3ViT": ({"num_register_tokens": 2}, 3),
}
TRACED = (  # each way of calling layers once
    "ViT",
    "Dinov2WithRegisters",
    "CLIPVision",
)
EAGER = {
    "rtol": 1e-5,
    "atol": 1e-5,
}  # transformers' softmax is in float32 for any dtype


def build(family, seed=0, attention="sdpa", **options):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**SMALL, **FAMILIES[family][0], **options)
    config._attn_implementation = attention
    model = getattr(transformers, f"{family}Model")(config).double().train()
    for name, p in model.named_parameters():
        if "query" in name or "key" in name or "q_proj" in name or "k_proj" in name:
            nn.init.normal_(p, std=0.25)
        elif not p.any() or p.dim() == 1:
            nn.init.normal_(p, mean=float("norm" in name and "bias" not in name), std=0.2)
        elif p.dim() == 2 and "mask" not in name:
            nn.init.normal_(p, std=0.1)
    return model


def image(*size):
    torch.manual_seed(2)
    return torch.randn(2, 3, *(size or (64, 64)), dtype=torch.float64)


def run(model, *size):
    more = {"interpolate_pos_encoding": True} if size and takes(model) else {}
    return model(pixel_values=image(*size), **more).last_hidden_state


def takes(model):
    """DINOv2 always interpolates, and has no such argument."""
    return "Dinov2" not in type(model).__name__


def attention_of(layer):
    (module,) = (m for m in layer.modules() if hasattr(m, "rpe_k"))
    return module


def layers_of(model):
    (layers,) = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    return layers


def projected(module, x):
    names = ("q_proj", "k_proj", "v_proj") if hasattr(module, "q_proj") else (
        "query", "key", "value")  # fmt: skip
    return [getattr(module, n)(x).unflatten(2, (2, 16)).transpose(1, 2) for n in names]


def output_of(module):
    """Before version 5, another module projects the output."""
    own = getattr(module, "o_proj", getattr(module, "out_proj", None))
    return own or nn.Identity()


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    ("family", "check"),
    [(f, c) for f in FAMILIES for c in CHECKS if c != "compiles" or f in TRACED],
)
def test_attached(family, check):
    getattr(hosting, check)(lambda seed: build(family, seed), run)


@pytest.mark.full
@pytest.mark.parametrize("family", TRACED)
def test_export(family):
    hosting.exports(lambda seed: build(family, seed), run, (), {"pixel_values": image()})


@pytest.mark.cases(3)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "ViTMAE"])
def test_a_layer_by_loops_on_a_rectangle(family, attention):
    model = build(family, attention=attention)
    irpe.attach(model, QKV)
    fill(model)
    module = attention_of(layers_of(model)[1])
    x, given, (found, _) = hosting.seen_by(module, lambda: run(model, 48, 80))
    prefix = FAMILIES[family][1]
    assert x.shape[1] == prefix + 15
    places = [grid(3, 5, prefix)] * 2
    q, k, v = projected(module, x)
    if family == "DINOv3ViT":  # has a rotary embedding, which stays
        from transformers.models.dinov3_vit import modeling_dinov3_vit as theirs

        q, k = theirs.apply_rotary_pos_emb(q, k, *given["position_embeddings"])
    wanted = hosting.by_loops(module, (q, k, v), output_of(module), places)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("family", ["ViT", "Dinov2WithRegisters", "CLIPVision"])
def test_two_grids_before_one_backward(family, reentrant):
    """2x8 and 8x2 have one length: each pass keeps its own, also where layers are recomputed."""
    model = build(family)
    irpe.attach(model, QKV)
    fill(model)

    def together():
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    runs = [lambda size=size: run(model, *size) for size in ((32, 128), (128, 32))]
    hosting.sum_of_passes(model, runs, together)


def test_a_masked_autoencoder_keeps_the_places_of_its_patches():
    model = build("ViTMAE")
    irpe.attach(model, QKV)
    fill(model)
    module = attention_of(layers_of(model)[1])
    x = torch.randn(2, 3, 48, 80, dtype=torch.float64)
    noise = torch.rand(2, 15)
    x, _, (found, _) = hosting.seen_by(
        module, lambda: model(pixel_values=x, noise=noise, interpolate_pos_encoding=True)
    )
    whole = grid(3, 5)
    kept = [[None, *(whole[i] for i in row[:7])] for row in noise.argsort(1).tolist()]
    assert x.shape[1] == 8
    wanted = hosting.by_loops(module, projected(module, x), output_of(module), kept)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["ViT", "CLIPVision"])
def test_attentions_where_the_host_gives_them(family):
    """The eager implementation's probabilities; the other implementations have none."""
    model = build(family, attention="eager").eval()
    wanted = model(pixel_values=image(), output_attentions=True, output_hidden_states=True)
    irpe.attach(model, QKV)
    found = model(pixel_values=image(), output_attentions=True, output_hidden_states=True)
    for name in ("attentions", "hidden_states"):
        assert len(found[name]) == len(wanted[name]) >= 2
        for mine, theirs in zip(found[name], wanted[name], strict=True):
            torch.testing.assert_close(mine, theirs, **EAGER)
    moved = fill(model)(pixel_values=image(), output_attentions=True).attentions[0]
    after = copy.deepcopy(model)
    irpe.detach(after)
    torch.testing.assert_close(run(after), wanted.last_hidden_state, rtol=0, atol=0)
    assert not torch.allclose(moved, wanted.attentions[0], atol=1e-3)
    torch.testing.assert_close(moved.sum(-1), torch.ones_like(moved[..., 0]))


def test_a_classifier_its_blocks_and_its_other_attention():
    """Some blocks only; the other blocks keep the library's attention, also later."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SMALL, num_labels=3)
    model = transformers.ViTForImageClassification(config).double().eval()
    before = model(image()).logits
    names = irpe.attach(copy.deepcopy(model), QK).modules
    assert len(names) == 2
    first, second = names
    assert irpe.attach(model, QK, where=second).modules == (second,)
    torch.testing.assert_close(model(image()).logits, before, rtol=1e-9, atol=1e-10)
    moved = fill(model)(image()).logits
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        torch.testing.assert_close(model(image()).logits, moved, **EAGER)
    irpe.attach(model, "rope-axial", where=first)
    assert not torch.allclose(model(image()).logits, moved, atol=1e-4)
    irpe.detach(model)
    assert torch.equal(model(image()).logits, before)


def test_both_towers_of_clip():
    """Only the images' tower has a grid."""
    vision = {**SMALL}
    text = {k: v for k, v in SMALL.items() if "size" not in k or k != "image_size"}
    config = transformers.CLIPConfig(
        vision_config=vision, text_config={**text, "vocab_size": 99, "eos_token_id": 98}
    )
    model = transformers.CLIPModel(config).eval()
    report = irpe.attach(model, QK)
    assert len(report.modules) == 2 and all("vision" in name for name in report.modules)
    ids = torch.tensor([[1, 5, 98]])
    assert model(input_ids=ids, pixel_values=image().float()).logits_per_image.isfinite().all()


def test_a_decoder_of_images_is_left_alone():
    torch.manual_seed(0)
    small = {k: v for k, v in SMALL.items() if k != "hidden_dropout_prob"}
    config = transformers.ViTMAEConfig(**small, decoder_hidden_size=16, decoder_num_hidden_layers=1,
                                       decoder_num_attention_heads=2)  # fmt: skip
    model = transformers.ViTMAEForPreTraining(config)
    noise = torch.rand(2, 16)
    before = model(image().float(), noise=noise).loss
    report = irpe.attach(model, QKV)
    assert len(report.modules) == 2 and all(name.startswith("vit.") for name in report.modules)
    torch.testing.assert_close(model(image().float(), noise=noise).loss, before)


def test_padding_masks():
    """What version 5 hands through: a mask of tokens."""
    if transformers.__version__ < "5":
        pytest.skip("version 4 has masks of heads only")
    model = build("ViT").eval()
    seen = torch.ones(2, 17, dtype=torch.long)
    seen[1, 9:] = 0
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        wanted = model(pixel_values=image(), attention_mask=seen).last_hidden_state
        irpe.attach(model, QKV)
        found = model(pixel_values=image(), attention_mask=seen).last_hidden_state
        irpe.detach(model)
        torch.testing.assert_close(found, wanted, **EAGER)
        assert not torch.allclose(found, run(model), atol=1e-3)


def test_wrong_use():
    text = transformers.BertModel(
        transformers.BertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1)
    )
    with pytest.raises(irpe.IrpeError, match="BertModel has no attention.*image encoders of"):
        irpe.attach(text, QK)
    cnn = transformers.ResNetModel(transformers.ResNetConfig(depths=[1], hidden_sizes=[8]))
    with pytest.raises(irpe.IrpeError, match="ResNetModel has no attention"):
        irpe.attach(cnn, QK)
    other = transformers.YolosModel(transformers.YolosConfig(**{**SMALL, "image_size": [64, 64]}))
    before = hosting.fingerprint(other)
    with pytest.raises(irpe.IrpeError, match=r"layer.*YolosEmbeddings.*not known.*ViTEmbeddings"):
        irpe.attach(other, QK)
    assert hosting.fingerprint(other) == before
    model = build("ViT")
    with pytest.raises(irpe.IrpeError, match="shaw.*one axis"):
        irpe.attach(model, "shaw,clip=4")
    with pytest.raises(irpe.IrpeError, match=r"'blocks\.\*' matches none.*attention"):
        irpe.attach(model, QK, where="blocks.*")
    irpe.attach(model, QK)
    with pytest.raises(irpe.IrpeError, match="0.*encoding already.*detach"):
        irpe.attach(model, QK)
    tokens = torch.zeros(1, 17, 32, dtype=torch.float64)
    run(model)
    with pytest.raises(irpe.IrpeError, match="no grid"):  # nothing is left over from the last pass
        layers_of(model)[0](tokens)
    with irpe.located(irpe.Grid(4, 4, prefix=1)):
        layers_of(model)[0](tokens)
    if transformers.__version__ < "5":
        with pytest.raises(irpe.IrpeError, match="head_mask"):
            model(pixel_values=image(), head_mask=torch.ones(2, 2))
