"""attach over timm's registry: a name for each family; all of them: python docs/make_support.py."""

import sys
from pathlib import Path

import pytest
import timm
from torch import nn

import irpe

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
import make_support as support

ATTACHED = (
    "beit_base_patch16_224", "coatnet_pico_rw_224", "crossvit_9_240", "davit_tiny",
    "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224", "fastvit_sa12",
    "flexivit_small", "maxvit_pico_rw_256", "mobilevit_xxs", "nest_tiny",
    "naflexvit_base_patch16_gap",
    "pit_ti_224", "samvit_base_patch16", "swin_tiny_patch4_window7_224", "swinv2_cr_tiny_ns_224",
    "swinv2_tiny_window8_256", "tiny_vit_5m_224", "visformer_tiny",
    "vit_relpos_small_patch16_224", "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224",
)  # fmt: skip
REFUSED = {
    "cait_xxs24_224": "blocks.0.attn.*TalkingHeadAttn.*mixes heads",
    "hiera_tiny_224": "blocks.0.attn.*MaskUnitAttention.*ordered by mask units",
    "levit_128s": "stages.0.blocks.0.attn.*its own way",
    "mobilenetv4_hybrid_medium": "MultiQueryAttention2d.*pooled from several patches.*where=",
    "mvitv2_tiny": "MultiScaleAttention.*its own way",
    "pvt_v2_b0": "stages.0.blocks.0.attn.*pooled from several patches",
    "volo_d1_224": "network.0.0.attn.*OutlookAttention.*where=",
}


@pytest.mark.cases(4)
@pytest.mark.parametrize("name", ATTACHED)
def test_a_name_of_each_family(name):
    found = support.examine(name)
    assert found["result"] == "attached" and support.problem(found) is None, found


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_which_module_and_why(name):
    with pytest.raises(irpe.IrpeError, match=REFUSED[name]) as caught:
        irpe.attach(support.built(name), support.SPEC)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["resnet10t", "xcit_nano_12_p16_224", "mixer_s32_224"])
def test_models_without_attention_over_places(name):
    with pytest.raises(irpe.IrpeError, match="has no attention that attach supports"):
        irpe.attach(support.built(name), support.SPEC)


def test_others_can_be_chosen_where_one_is_refused():
    model = timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1))
    report = irpe.attach(model, support.SPEC, where="stages.3.*")
    assert report.modules == ("stages.3.blocks.0.attn",)


def test_the_walk_notices_what_is_left_out():
    """A model with an encoding on half of its attention counts as a failure."""
    whole = support.examine("vit_tiny_patch16_224")
    assert whole["modules"] == 12 and not whole["left"] and support.problem(whole) is None
    assert "runs without an encoding" in support.problem({**whole, "left": {"Attention": 6}})
    text = support.table([whole, {"name": "x", "family": "resnet", "result": "no attention"}])
    assert "| **vision_transformer** | 1 |" in text and "says so: resnet" in text


def test_wrong_options():
    model = nn.MultiheadAttention(8, 2)
    with pytest.raises(irpe.IrpeError, match="native='drop' is not one of keep, replace"):
        irpe.attach(model, "rope-axial", native="drop")
    text = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9))
    with pytest.raises(irpe.IrpeError, match="Sequential has no attention.*RPEAttention"):
        irpe.attach(text, "rope-axial")
