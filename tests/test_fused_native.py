"""``attach(native="fuse")``: the native encoding as terms gives what the model gave."""

import copy
import re
from pathlib import Path

import hosting
import pytest
import timm
import torch
from fused import DEVICE
from hosting import everything, losses_stay, same

import irpe
from irpe.encodings.window import WindowBuckets

F64 = torch.float64
SAM = {
    "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "use_rel_pos": True,
    "global_attn_indexes": (2,), "window_size": 3, "neck_chans": 8, "num_classes": 5,
}  # fmt: skip
SWIN = {"patch_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2), "num_classes": 5,
        "drop_path_rate": 0.0}  # fmt: skip
VIT = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
MAXVIT = {"embed_dim": (32, 64), "depths": (1, 1), "num_classes": 5}
MODELS = {
    "sam": ("samvit_base_patch16", {**SAM, "img_size": 20}),
    "sam rectangle": ("samvit_base_patch16", {**SAM, "img_size": (12, 20)}),
    "swin": ("swin_tiny_patch4_window7_224", {**SWIN, "img_size": 16, "window_size": 4}),
    "swin rectangle": (
        "swin_tiny_patch4_window7_224", {**SWIN, "img_size": (12, 24), "window_size": (3, 6)},
    ),
    "swinv2": ("swinv2_tiny_window8_256", {**SWIN, "img_size": 16, "window_size": 4}),
    "tiny vit": (
        "tiny_vit_5m_224",
        {
            "embed_dims": (8, 16, 16, 16), "depths": (1, 1, 1, 1),
            "num_heads": (1, 2, 2, 2), "window_sizes": (7, 2, 2, 1), "num_classes": 5,
            "drop_path_rate": 0.0,
        },
    ),
    "beit": ("beit_base_patch16_224", {**VIT, "img_size": 12}),
    "beit rectangle": ("beit_base_patch16_224", {**VIT, "img_size": (12, 20)}),
    "beit shared": (
        "beit_base_patch16_224",
        {**VIT, "img_size": (12, 20), "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
    ),
    "beit both": (
        "beit_base_patch16_224", {**VIT, "img_size": 12, "use_shared_rel_pos_bias": True},
    ),
    "relpos mlp": ("vit_relpos_base_patch16_224", {**VIT, "img_size": (12, 20)}),
    "relpos shared": ("vit_srelpos_small_patch16_224", {**VIT, "img_size": (12, 20)}),
    "relpos class": (
        "vit_relpos_base_patch16_224",
        {**VIT, "img_size": (12, 20), "class_token": True, "rel_pos_type": "bias"},
    ),
    "relpos mlp class": (
        "vit_relpos_base_patch16_224", {**VIT, "img_size": 12, "class_token": True},
    ),
    "maxvit": ("maxvit_rmlp_pico_rw_256", {**MAXVIT, "img_size": (32, 64)}),
    "maxvit bias": ("maxvit_pico_rw_256", {**MAXVIT, "img_size": (32, 64)}),
    "maxvit tf": ("maxvit_tiny_tf_224", {**MAXVIT, "img_size": (32, 64)}),
}  # fmt: skip


def made(name, dtype=F64):
    """A model whose native tables are drawn at random."""
    torch.manual_seed(0)
    kind, options = MODELS[name]
    model = timm.create_model(kind, **options).to(dtype)
    for key, parameter in model.named_parameters():
        native = ("rel_pos", "relative_position", "attention_biases", "norm", "cpb_mlp", "gamma")
        if any(name in key for name in native):
            torch.nn.init.normal_(parameter, std=0.5)
    size = options.get("img_size", (32, 64))
    size = size if isinstance(size, tuple) else (size, size)
    return model, torch.randn(2, 3, *size, dtype=dtype)


def outcome(model, x):
    return hosting.outcome(model, x, lambda m, x: m(x))


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name, monkeypatch):
    model, x = made(name)
    plain = copy.deepcopy(model)
    report = irpe.attach(model, native="fuse")
    assert "fused" in str(report) and not report.parameters and not report.keys
    wanted = outcome(plain, x)
    # Nothing of the model's own computes a bias of all pairs.
    from timm import layers, models

    def never(*given):
        raise AssertionError("a bias of all pairs")

    monkeypatch.setattr(models.vision_transformer_sam, "get_decomposed_rel_pos_bias", never)
    for kind, method in (
        (models.swin_transformer.WindowAttention, "_get_rel_pos_bias"),
        (models.beit.Attention, "_get_rel_pos_bias"),
        (models.beit.RelativePositionBias, "forward"),
        (layers.RelPosBias, "get_bias"),
        (layers.RelPosBiasTf, "get_bias"),
        (layers.RelPosMlp, "get_bias"),
        (models.tiny_vit.Attention, "get_attention_biases"),
    ):
        monkeypatch.setattr(kind, method, never)
    same(outcome(model, x), wanted, rtol=1e-9, atol=1e-9)
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("name", ["sam", *(n for n in MODELS if n[:4] not in ("sam ", "tiny"))])
def test_another_size(name):
    model, _ = made(name)
    plain = copy.deepcopy(model)
    irpe.attach(model, native="fuse")
    if name != "sam":
        size = (64, 32) if "maxvit" in name else (24, 16)
        model.eval(), plain.eval()
        for one in (model, plain):
            one.set_input_size(img_size=size)
        x = torch.randn(1, 3, *size, dtype=F64)
    else:  # 3 x 7 patches, where a window has 3 x 3 and the last block's tables are interpolated
        options = {**MODELS["sam"][1], "img_size": (12, 28)}
        for n, one in enumerate((model, plain)):
            other = timm.create_model("samvit_base_patch16", **options).double()
            found = {k: v for k, v in one.state_dict().items() if "pos_embed" not in k}
            wide = other.blocks[2].attn
            found = {k: v for k, v in found.items() if not k.startswith("blocks.2.attn.rel_pos")}
            other.load_state_dict(found, strict=False)
            for side in "hw":  # tables of another size than the grid
                table = getattr(one.blocks[2].attn, f"rel_pos_{side}")
                setattr(wide, f"rel_pos_{side}", torch.nn.Parameter(table.detach().clone()))
            torch.nn.init.zeros_(other.pos_embed)
            if n == 0:
                irpe.attach(other, native="fuse")
                model = other
            else:
                plain = other
        x = torch.randn(1, 3, 12, 28, dtype=F64)
    same(outcome(model, x), outcome(plain, x), rtol=1e-6, atol=1e-6)


SOME = [
    "sam",
    "swin rectangle",
    "swinv2",
    "beit both",
    "relpos shared",
    "relpos class",
    "maxvit tf",
]


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", SOME)
def test_training_has_the_same_losses(name):
    plain, x = made(name)
    model = copy.deepcopy(plain)
    irpe.attach(model, native="fuse")
    losses_stay(model, plain, lambda one: one(x).logsumexp(-1).mean())


@pytest.mark.parametrize("name", MODELS)
def test_detach_restores(name):
    model, x = made(name)
    before = everything(model)
    irpe.attach(model, native="fuse")
    with pytest.raises(irpe.IrpeError, match="already") as error:
        irpe.attach(model, native="fuse")
    assert "None" not in str(error.value)
    irpe.detach(model)
    assert everything(model) == before
    same([model(x)], [made(name)[0](x)])


@pytest.mark.parametrize("name", SOME)
def test_with_an_encoding_of_ours(name):
    """Neutral tables change nothing until they are trained; then both act."""
    model, x = made(name)
    model.eval()
    plain = copy.deepcopy(model)
    report = irpe.attach(model, "rpe-1.9-product-ctx-1-k", native="fuse")
    assert report.parameters and "fused" in str(report)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-9, atol=1e-9)
    kept = copy.deepcopy(plain)
    irpe.attach(kept, "rpe-1.9-product-ctx-1-k")
    for one in (model, kept):
        torch.manual_seed(3)
        for key, parameter in one.named_parameters():
            if "lookup_table" in key:
                torch.nn.init.normal_(parameter)
    torch.testing.assert_close(model(x), kept(x), rtol=1e-9, atol=1e-9)


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", SOME)
def test_compiled_checkpointed_copied_and_mapped(name):
    model, x = made(name, torch.float32)
    irpe.attach(model, native="fuse")
    wanted = model.eval()(x)
    torch.testing.assert_close(copy.deepcopy(model)(x), wanted)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x), wanted, rtol=1e-4, atol=1e-5)
    grads = outcome(model.train(), x)
    model.set_grad_checkpointing()
    same(outcome(model, x), grads, rtol=1e-4, atol=1e-5)
    maps = irpe.attention_maps(model.eval(), x)
    for path, weights in maps.items():
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1))), path


def test_files_are_those_of_the_plain_model(tmp_path):
    """Fusing is a way to compute, as a backend is: a file does not hold it."""
    model, x = made("sam")
    irpe.attach(model, native="fuse")
    irpe.save(model, tmp_path / "fused.safetensors")
    other, _ = made("sam")
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    irpe.load(other, tmp_path / "fused.safetensors")
    assert not irpe.specs(other)
    torch.testing.assert_close(other(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("model", "given", "reason"),
    [
        ("vit_tiny_patch16_224", {}, "no native encoding that can be fused"),
        ("resnet18", {}, "no attention"),
        ("swinv2_cr_tiny_224", {}, "its bias has dropout for each pair of patches"),
        ("davit_tiny", {}, "no native encoding that can be fused"),
    ],
)
def test_what_cannot_be_fused_is_one_line(model, given, reason):
    with torch.device("meta"):
        made = timm.create_model(model, **given)
    with pytest.raises(irpe.IrpeError, match=reason) as caught:
        irpe.attach(made, native="fuse")
    assert "\n" not in str(caught.value)
    with pytest.raises(irpe.IrpeError, match="needs an encoding"):
        irpe.attach(made)
    with pytest.raises(irpe.IrpeError, match="keep, replace, fuse"):
        irpe.attach(made, "rope-axial", native="fused")


def test_rotated_queries_are_refused():
    model, _ = made("sam")
    with pytest.raises(irpe.IrpeError, match="rotates"):
        irpe.attach(model, "rope-axial", native="fuse")
    assert type(model.blocks[0].attn).__name__ == "Attention"


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    ("backend", "side"), [("eager", (9, 11)), ("sdpa", (3, 5)), ("triton", (3, 5))]
)
@pytest.mark.parametrize("by_key", [False, True])
def test_buckets_of_a_class_token(backend, side, by_key):
    """Three of them: to patches, of patches, to itself."""
    height, width = side
    grid, size = irpe.Grid(*side, prefix=1), (2 * height - 1) * (2 * width - 1) + 3
    ids = (
        irpe.BucketIds(WindowBuckets(*side, apart=True), grid)
        .oriented(by_key)
        .dense(torch.device("cpu"))
    )
    first, second = (size - 2, size - 3) if by_key else (size - 3, size - 2)
    assert ids[0, 0] == size - 1 and (ids[0, 1:] == first).all() and (ids[1:, 0] == second).all()
    assert ids[1:, 1:].unique().tolist() == list(range(size - 3))
    torch.manual_seed(0)
    found = {}
    q, k, v = (torch.randn(2, 4, height * width + 1, 16) for _ in range(3))
    table = torch.randn(4, size)
    for name in (backend, "reference"):
        inputs = [x.clone().to(DEVICE).requires_grad_() for x in (q, k, v, table)]
        term = irpe.Term(
            "bias", inputs[3], irpe.BucketIds(WindowBuckets(*side, apart=True), grid), by_key=by_key
        )
        out = irpe.attention(*inputs[:3], (term,), backend=name)
        found[name] = [out, *torch.autograd.grad(out.square().sum(), inputs)]
    same(found[backend], found["reference"], rtol=1e-4, atol=1e-4)


def test_every_family_that_is_fused_is_in_the_documents():
    from irpe.hosts.timm.override import Attached
    from irpe.hosts.timm.sites import KINDS

    fused = {
        kind.__module__.rpartition(".")[2]
        for kind, made in KINDS.items()
        if made.native_terms is not Attached.native_terms
    }
    section = (Path(__file__).parents[1] / "docs" / "support.md").read_text()
    section = section.split("## Native encodings that are fused")[1].split("\n## ")[0]
    assert fused == set(re.findall(r"^\| (\w+).* \| timm \|", section, flags=re.MULTILINE))
    assert fused == {
        timm.models.model_entrypoint(kind).__module__.rpartition(".")[2]
        for kind, _ in MODELS.values()
    }
