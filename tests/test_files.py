"""irpe.save and irpe.load: every family, every way, difference 0.0; and what does not fit."""

import copy
import json
import sys
from functools import partial

import families
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from hosting import fill
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import nn

import irpe
from irpe.files.read import read_checkpoint
from models.deit import DeiT
from models.detr import build_detr
from models.text import CausalLM

K, QKV = "rpe-1.9-product-ctx-1-k", "rpe-1.9-product-ctx-1-qkv"
SMALL = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
TABLE = "blocks.0.attn.rpe_k.lookup_table_weight"


def vit(**options):
    return timm.create_model("vit_tiny_patch16_224", **{**SMALL, **options}).eval()


def attached(make=vit, spec=QKV, **options):
    model = make()
    irpe.attach(model, spec, **options)
    return fill(model)


def encoder():
    layer = nn.TransformerEncoderLayer(24, 3, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def torchvision_vit(**options):
    small = {"image_size": 64, "patch_size": 16, "num_layers": 2, "num_heads": 2}
    return torchvision.models.VisionTransformer(
        **{**small, "hidden_dim": 32, "mlp_dim": 48, "num_classes": 3, **options}
    )


HOSTS = {name: (family.make, family.where) for name, family in families.FAMILIES.items()}
HOSTS |= {"torchvision": (torchvision_vit, "*"), "torch": (encoder, "*")}


def same(model, other):
    """Whether all weights and specs are equal, without any tolerance."""
    ours, theirs = model.state_dict(), other.state_dict()
    assert irpe.specs(model) == irpe.specs(other)
    return list(ours) == list(theirs) and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


@pytest.mark.cases(4)
@pytest.mark.parametrize("host", HOSTS)
def test_round_trip(host, tmp_path):
    """Into a plain model, one with the encoding, a compiled one; and by the state dict alone."""
    make, where = HOSTS[host]
    model = attached(make, where=where)
    irpe.save(model, tmp_path / "a.safetensors")
    torch.save(model.state_dict(), tmp_path / "a.pt")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "b.safetensors")
    plain = make()
    report = irpe.load(plain, tmp_path / "a.safetensors")
    assert same(model, plain) and set(report.attached) == set(irpe.specs(model))
    assert set(report.taken) == set(model.state_dict()) and "\n" not in str(report)
    for name in ("a.safetensors", "a.pt", "b.safetensors"):
        other = make()
        irpe.attach(other, QKV, where=where)
        assert not same(model, other)
        assert not irpe.load(other, tmp_path / name).attached
        assert same(model, other)


OWN = {
    "DeiT": lambda: DeiT(**SMALL, rpe=K),
    "DETR": lambda: build_detr(
        num_classes=3, enc_layers=1, dec_layers=1, hidden_dim=32, nheads=2, enc_rpe2d=K,
        dim_feedforward=32, pretrained_backbone=False,
    ),
    "text": lambda: CausalLM(11, "t5,buckets=8,max=20", dim=32, depth=2, num_heads=2),
    "text, tied": lambda: CausalLM(11, "learned,length=9", dim=32, depth=2, num_heads=2, tied=True),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_models_that_have_their_encodings(name, tmp_path):
    model, other = OWN[name](), OWN[name]()
    irpe.save(fill(model), tmp_path / "a.safetensors")
    irpe.load(other, tmp_path / "a.safetensors")
    assert irpe.specs(model) and same(model, other)


@pytest.mark.parametrize("spec", ["rope-axial", "rope-mixed", "alibi", f"rope-axial + {K}"])
def test_outputs_of_several_specs(spec, tmp_path):
    model, other, x = attached(spec=spec), vit(), torch.randn(1, 3, 64, 64)
    irpe.save(model, tmp_path / "a.safetensors")
    irpe.load(other, tmp_path / "a.safetensors")
    assert torch.equal(model(x), other(x)) and same(model, other)


def test_specs_by_layer_and_options(tmp_path):
    specs = {"blocks.0.*": "rope-axial", "blocks.1.*": K}
    model, other = vit(), vit()
    irpe.attach(model, specs)
    irpe.save(fill(model), tmp_path / "a.safetensors")
    irpe.load(other, tmp_path / "a.safetensors")
    assert same(model, other) and len(set(irpe.specs(other).values())) == 2
    # The native encoding that was replaced stays replaced.
    make, x = families.FAMILIES["swin"].make, torch.randn(1, 3, 16, 24)
    model, other = attached(make, native="replace").eval(), make().eval()
    irpe.save(model, tmp_path / "a.safetensors")
    irpe.load(other, tmp_path / "a.safetensors")
    assert torch.equal(model(x), other(x))


def blocks():
    return nn.Sequential(*(Block(24, 3) for _ in range(2)))


@pytest.mark.parametrize("make", [encoder, blocks])
@pytest.mark.parametrize("spec", [K, "rpe-2.0-cross-bias-0-k"])
def test_prefix_tokens_that_only_the_caller_knows(make, spec, tmp_path):
    model, other, x = make().eval(), make().eval(), torch.randn(1, 7, 24)
    with irpe.located(irpe.Grid(2, 3, prefix=1)):
        irpe.attach(model, spec)
    irpe.save(fill(model), tmp_path / "a.safetensors")
    irpe.load(other, tmp_path / "a.safetensors")
    with irpe.located(irpe.Grid(2, 3, prefix=1)):
        assert same(model, other) and torch.equal(model(x), other(x))


WRAPPERS = {
    "DataParallel": lambda state: {f"module.{n}": v for n, v in state.items()},
    "compile": lambda state: {f"_orig_mod.{n}": v for n, v in state.items()},
    "both": lambda state: {"state_dict": {f"module._orig_mod.{n}": v for n, v in state.items()}},
    "a module": lambda state: {"state_dict": {f"model.{n}": v for n, v in state.items()}},
    "averaged": lambda state: {"model_ema": state, "epoch": 3},
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_prefixes_of_wrappers(name, tmp_path):
    model, other = attached(), attached()
    torch.save(WRAPPERS[name](model.state_dict()), tmp_path / "a.pt")
    irpe.load(other, tmp_path / "a.pt")
    assert same(model, other)


def test_wrapped_models(tmp_path):
    model, other = attached(), vit()
    irpe.save(torch.compile(nn.DataParallel(model)), tmp_path / "a.safetensors")
    irpe.load(torch.compile(other), tmp_path / "a.safetensors")
    assert same(model, other)


def test_shared_parameters_and_files_that_exist(tmp_path):
    model = attached()
    model.blocks[1].mlp = model.blocks[0].mlp
    path = tmp_path / "a.safetensors"
    irpe.save(model, path)
    irpe.save(model, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    other = vit()
    irpe.load(other, path)
    assert same(model, other)


def test_shards(tmp_path):
    model, other = attached(), attached()
    state = model.state_dict()
    files = {name: f"model-{i % 2 + 1}-of-2.safetensors" for i, name in enumerate(state)}
    for file in set(files.values()):
        part = {name: state[name] for name in state if files[name] == file}
        safetensors.torch.save_file(part, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    for path in (tmp_path, index):
        fill(other, seed=5)
        irpe.load(other, path)
        assert same(model, other)
    (tmp_path / "model-1-of-2.safetensors").unlink()
    with pytest.raises(irpe.IrpeError, match="model-1-of-2.safetensors' is not a file"):
        irpe.load(other, tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(irpe.IrpeError, match="outside its folder"):
        irpe.load(other, tmp_path)


def saved(path, kind, model):
    """A file of one kind, of a model."""
    if kind == "irpe":
        irpe.save(model, path / "a.safetensors")
        return path / "a.safetensors"
    torch.save(model.state_dict(), path / "a.pt")
    return path / "a.pt"


REFUSED = [
    # file of, model, message
    ("state", attached, vit, f"has tables \\({TABLE.replace('_k', '_q')}.*attach\\(model, spec\\)"),
    ("irpe", vit, attached, "0.attn has rpe-1.9.*no encoding there.*differ='tables'"),
    ("state", vit, attached, f"lacks the tables.*{TABLE.replace('_k', '_q')}.*differ='tables'"),
    ("irpe", attached, partial(attached, spec=K), "0.attn has .*-k, and .* has .*-qkv there"),
    ("irpe", attached, partial(attached, spec="alibi"), "0.attn has alibi.*-qkv there"),
    (
        "irpe",
        attached,
        partial(vit, num_classes=5),
        r"head.weight \[3, 32\] .*differ='head' allows",
    ),
    ("irpe", attached, partial(vit, img_size=96), "pos_embed.*differ='positions' allows"),
    ("irpe", attached, partial(vit, depth=1), "modules that this .* does not have: blocks.1.attn"),
    ("irpe", vit, partial(vit, depth=1), "12 unknown to the model: blocks.1."),
    ("irpe", vit, partial(vit, embed_dim=48), "cls_token"),
]


@pytest.mark.parametrize(("kind", "make", "other", "says"), REFUSED, ids=range(len(REFUSED)))
def test_what_does_not_fit_changes_nothing(kind, make, other, says, tmp_path):
    path, model = saved(tmp_path, kind, make()), other()
    before = copy.deepcopy(model)
    with pytest.raises(irpe.IrpeError, match=says) as error:
        irpe.load(model, path)
    assert "\n" not in str(error.value) and same(model, before)


@pytest.mark.parametrize("spec", [QKV, None])
def test_a_failed_load_leaves_what_was_attached_before(spec, tmp_path):
    irpe.save(attached(partial(vit, embed_dim=48)), tmp_path / "a.safetensors")
    model = vit()
    if spec is None:
        model = timm.create_model(
            "beit_base_patch16_224", img_size=64, embed_dim=32, depth=2, num_heads=2
        )
        irpe.attach(model, native="fuse", where="blocks.0.*")
    else:
        irpe.attach(model, spec, where="blocks.0.*")
    before = copy.deepcopy(model)
    with pytest.raises(irpe.IrpeError):
        irpe.load(model, tmp_path / "a.safetensors")
    assert same(model, before)
    kinds = [[type(m) for m in one.modules()] for one in (model, before)]
    assert kinds[0] == kinds[1]
    irpe.detach(model)


def test_a_block_in_two_places(tmp_path):
    def make(shared):
        model = vit(depth=3)
        if shared:
            model.blocks[2] = model.blocks[0]
        return model

    model = attached(partial(make, True))
    irpe.save(model, tmp_path / "a.safetensors")
    x = torch.randn(2, 3, 64, 64)
    for shared in (True, False):
        other = make(shared)
        loaded = irpe.load(other, tmp_path / "a.safetensors")
        assert len(loaded.attached) == len(irpe.specs(other)) == (2 if shared else 3)
        assert torch.equal(other(x), model(x))


def test_arguments_of_other_types(tmp_path):
    irpe.save(vit(), tmp_path / "a.safetensors")
    for given, says in (
        ((3, tmp_path / "a.safetensors"), "torch.nn.Module.*not int"),
        ((vit(), 3), "the path of a file, not VisionTransformer, int"),
    ):
        with pytest.raises(irpe.IrpeError, match=says):
            irpe.load(*given)
    with pytest.raises(irpe.IrpeError, match="differ=None is not"):
        irpe.load(vit(), tmp_path / "a.safetensors", differ=None)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"irpe": "{}", "irpe_options": "[1]"}, "damaged: its irpe_options"),
        ({"irpe": "{}", "irpe_options": "{"}, "damaged: its irpe_options"),
        ({"irpe": "[1]"}, "not a JSON object of specs"),
        ({"irpe": '{"blocks.0.attn": "rpx"}'}, "rpx"),
    ],
)
def test_damaged_metadata(content, says, tmp_path):
    safetensors.torch.save_file(vit().state_dict(), tmp_path / "a.safetensors", content)
    with pytest.raises(irpe.IrpeError, match=says):
        irpe.load(vit(), tmp_path / "a.safetensors")


def test_names_that_cannot_be_written(tmp_path):
    for path, says in (
        (tmp_path / "a.pt", ".safetensors"),
        (tmp_path / "b/a.safetensors", "folder"),
    ):
        with pytest.raises(irpe.IrpeError, match=says):
            irpe.save(vit(), path)
    with pytest.raises(irpe.IrpeError, match="differ='heads': 'heads' is not one of head, pos"):
        irpe.load(vit(), tmp_path / "a.pt", differ="heads")
    with torch.device("meta"):
        model = vit()
    for call in (irpe.save, irpe.load):
        with pytest.raises(irpe.IrpeError, match="meta"):
            call(model, tmp_path / "a.safetensors")


def test_safetensors_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(irpe.IrpeError, match="pip install safetensors"):
        irpe.save(vit(), tmp_path / "a.safetensors")
    torch.save(vit().state_dict(), tmp_path / "a.pt")
    irpe.load(vit(), tmp_path / "a.pt")


# Fine-tuning


def counts(report):
    return tuple(len(x) for x in (report.taken, report.resized, report.fresh, report.ignored))


def test_plain_weights_start_a_model_with_tables(tmp_path):
    plain, model = vit(), attached()
    path = saved(tmp_path, "irpe", plain)
    tables = {n: v.clone() for n, v in model.state_dict().items() if "lookup" in n}
    report = irpe.load(model, path, differ="tables")
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
    assert all(torch.equal(state[name], value) for name, value in tables.items())
    assert set(report.fresh) == set(tables) and "6 left fresh" in str(report)
    # And back: tables are named, and the model stays plain.
    path, other = saved(tmp_path, "irpe", model), vit()
    report = irpe.load(other, path, differ="tables")
    assert not irpe.specs(other) and set(report.ignored) == set(tables)


def test_tables_of_the_same_shape_and_another_encoding_stay_fresh(tmp_path):
    first, second = attached(spec=K), attached(spec="rpe-1.9-product-ctx-1-k,gamma=20.0")
    assert first.state_dict()[TABLE].shape == second.state_dict()[TABLE].shape
    path, before = saved(tmp_path, "irpe", first), second.state_dict()[TABLE].clone()
    assert TABLE in irpe.load(second, path, differ=("tables",)).fresh
    assert torch.equal(second.state_dict()[TABLE], before)


HEADS = {
    "timm": (vit, {"num_classes": 5}, "head.weight"),
    "timm, none": (vit, {"num_classes": 0}, None),
    "torchvision": (torchvision_vit, {"num_classes": 5}, "heads.head.weight"),
}


@pytest.mark.parametrize("name", HEADS)
def test_another_number_of_classes(name, tmp_path):
    make, options, head = HEADS[name]
    model, other = attached(make), make(**options)
    path = saved(tmp_path, "irpe", model)
    before = copy.deepcopy(other.state_dict())
    report = irpe.load(other, path, differ="head")
    assert counts(report)[1:] == ((0, 2, 0) if head else (0, 0, 2))
    state = other.state_dict()
    assert head is None or torch.equal(state[head], before[head])
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in report.taken)


@pytest.mark.parametrize("old", [(64, 64), (32, 128)])
def test_another_image_size_by_timm(old, tmp_path):
    """16 patches in both cases: the file says how they lie."""
    model, other = attached(partial(vit, img_size=old)), vit(img_size=(96, 128))
    report = irpe.load(other, saved(tmp_path, "irpe", model), differ="positions")
    wanted = resample_abs_pos_embed(model.pos_embed, [6, 8], [n // 16 for n in old])
    assert report.resized == ("pos_embed",) and torch.equal(other.pos_embed, wanted)
    assert not report.fresh and "1 resized (pos_embed)" in str(report)


RESIZED = {
    "eva": ("eva02_tiny_patch14_224", {"embed_dim": 48, "depth": 1, "num_heads": 2}, 56, 84),
    "beit": ("beit_base_patch16_224", {"embed_dim": 32, "depth": 1, "num_heads": 2}, 32, 64),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"depths": (1, 1), "num_heads": (1, 2), "embed_dim": 16},
        56,
        112,
    ),
}


@pytest.mark.parametrize("name", RESIZED)
def test_other_families_of_timm(name, tmp_path):
    """Native relative biases follow the size too; all that timm resizes is timm's own result."""
    architecture, options, old, new = RESIZED[name]

    def make(size):
        window = {"window_size": size // 8} if name == "swin" else {}
        return timm.create_model(architecture, img_size=size, num_classes=3, **options, **window)

    model, other = attached(partial(make, old)), make(new)
    report = irpe.load(other, saved(tmp_path, "irpe", model), differ="positions")
    assert report.resized and not report.fresh and not report.ignored
    filtered = sys.modules[type(model).__module__].checkpoint_filter_fn
    wanted = filtered(dict(model.state_dict()), make(new))
    assert all(torch.equal(other.state_dict()[n], wanted[n]) for n in report.resized)


def test_another_image_size_by_torchvision(tmp_path):
    from torchvision.models.vision_transformer import interpolate_embeddings

    model, other = attached(torchvision_vit), torchvision_vit(image_size=96)
    report = irpe.load(other, saved(tmp_path, "irpe", model), differ="positions")
    wanted = interpolate_embeddings(96, 16, dict(model.state_dict()))["encoder.pos_embedding"]
    assert report.resized == ("encoder.pos_embedding",)
    assert torch.equal(other.encoder.pos_embedding, wanted)


def test_a_size_that_cannot_be_resized(tmp_path):
    model = vit(img_size=(64, 48))  # 12 tokens are not a square, and a state dict has no size
    with pytest.raises(irpe.IrpeError, match="cannot resize pos_embed"):
        irpe.load(vit(), saved(tmp_path, "state", model), differ="positions")


def test_a_detr_on_other_categories(tmp_path):
    small = {"enc_layers": 1, "dec_layers": 1, "hidden_dim": 32, "nheads": 2, "num_queries": 5}
    small |= {"dim_feedforward": 32, "pretrained_backbone": False}
    model, other = (
        build_detr(num_classes=9, **small),
        build_detr(num_classes=4, enc_rpe2d=K, **small),
    )
    torch.save({"model": model.state_dict()}, tmp_path / "detr.pth")
    report = irpe.load(other, tmp_path / "detr.pth", differ="head, tables")
    assert {name.split(".")[0] for name in report.fresh} == {"class_embed", "transformer"}
    assert len(report.fresh) == 3 and not report.ignored


# Each library's own way


def test_timm_files(tmp_path):
    from timm.models import save_for_hf

    model = attached()
    irpe.save(model, tmp_path / "a.safetensors")
    with pytest.raises(RuntimeError, match="rpe_k.lookup_table_weight"):  # timm is strict
        timm.create_model(
            "vit_tiny_patch16_224", **SMALL, checkpoint_path=tmp_path / "a.safetensors"
        )
    save_for_hf(model, tmp_path / "hf", {"irpe": irpe.specs(model)}, safe_serialization=True)
    with pytest.raises(RuntimeError, match="rpe_k.lookup_table_weight"):
        timm.create_model(f"local-dir:{tmp_path / 'hf'}", pretrained=True)
    other = timm.create_model(f"local-dir:{tmp_path / 'hf'}")
    irpe.load(other, tmp_path / "hf")
    assert same(model, other)


def test_timm_names_that_have_tables(tmp_path):
    import irpe.zoo

    name = "deit_tiny_patch16_224_ctx_product_50_shared_k"
    model = fill(timm.create_model(name, **SMALL))
    irpe.save(model, tmp_path / "a.safetensors")
    assert same(model, timm.create_model(name, **SMALL, checkpoint_path=tmp_path / "a.safetensors"))


def test_metadata_builds_the_model(tmp_path):
    model = attached(partial(vit, reg_tokens=2, in_chans=1))
    irpe.save(model, tmp_path / "a.safetensors")
    config = json.loads(read_checkpoint(tmp_path / "a.safetensors").about["irpe_model"])
    other = timm.create_model(config["architecture"], **config["model_args"])
    irpe.load(other, tmp_path / "a.safetensors")
    assert same(model, other)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("kind", ["axial", "mixed"])
def test_released_weights_of_rope_vit(kind, absolute, tmp_path):
    """timm's model of the same weights has other names, and is the oracle."""
    from timm.models.eva import Eva

    mixed = {"rope_type": "mixed", "rope_temperature": 10.0} if kind == "mixed" else {}
    theirs = Eva(
        **SMALL, patch_size=16, attn_type="rope", qkv_bias=True, init_values=1e-5,
        global_pool="token", no_embed_class=True, use_abs_pos_emb=absolute, use_rot_pos_emb=True,
        rope_grid_indexing="xy", **{"rope_temperature": 100.0, **mixed},
    ).eval()  # fmt: skip
    for name, p in theirs.named_parameters():
        if name != "rope.freqs":
            nn.init.normal_(p, std=0.3 if p.dim() > 1 else 1.0)
    released = {}
    for name, value in theirs.state_dict().items():
        if name == "rope.freqs":  # [2, layers, H D / 2] there, with positions beside it
            value, name = value.reshape(2, 2, 32 // 2), "freqs"
            released |= {"freqs_t_x": torch.arange(16.0), "freqs_t_y": torch.arange(16.0)}
        released[name] = value
    torch.save({"model": released}, tmp_path / "released.bin")
    model = timm.create_model(
        "deit3_small_patch16_224", **SMALL, **({} if absolute else {"pos_embed": "none"})
    ).eval()
    if kind == "mixed":
        with pytest.raises(irpe.IrpeError, match=r"attach\(model, 'rope-mixed'\) first"):
            irpe.load(model, tmp_path / "released.bin")
    irpe.attach(model, "rope-mixed" if kind == "mixed" else "rope-axial,order=xy")
    irpe.load(model, tmp_path / "released.bin")
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=1e-5)
    irpe.detach(model)
    assert not torch.allclose(model(x), theirs(x), atol=1e-3)


@pytest.mark.parametrize(("saved", "own"), [("replace", "keep"), ("keep", "replace")])
def test_a_native_encoding_that_one_of_both_replaced(saved, own, tmp_path):
    def make(native):
        model = timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=16, depths=(2,),
            num_heads=(2,), num_classes=3,
        )  # fmt: skip
        irpe.attach(model, K, native=native)
        return model

    file = tmp_path / "model.safetensors"
    irpe.save(make(saved), file)
    assert irpe.load(make(saved), file)
    with pytest.raises(irpe.IrpeError, match=f"native='{own}'.*native='{saved}'.*detach"):
        irpe.load(make(own), file)
