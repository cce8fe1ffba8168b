"""The published names in timm's registry: built, trained, loaded and copied by timm's own means."""

import argparse
import copy
import functools
import http.server
import pickle
import threading

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

import irpe
import irpe.zoo

PRODUCT = "patch16_224_ctx_product_50_shared"
NAMES = {
    f"deit_tiny_{PRODUCT}_k": (192, 3, "rpe-1.9-product-ctx-1-k"),
    f"deit_small_{PRODUCT}_k": (384, 6, "rpe-1.9-product-ctx-1-k"),
    f"deit_small_{PRODUCT}_qk": (384, 6, "rpe-1.9-product-ctx-1-qk"),
    f"deit_small_{PRODUCT}_qkv": (384, 6, "rpe-1.9-product-ctx-1-qkv"),
    f"deit_base_{PRODUCT}_k": (768, 12, "rpe-1.9-product-ctx-1-k"),
    f"deit_base_{PRODUCT}_qkv": (768, 12, "rpe-1.9-product-ctx-1-qkv"),
    "deit_small_patch16_224_ctx_euc_20_shared_k": (384, 6, "rpe-20.0-euc-ctx-1-k"),
    "deit_small_patch16_224_ctx_quant_51_shared_k": (384, 6, "rpe-33.0-quant-ctx-1-k"),
    "deit_small_patch16_224_ctx_cross_56_shared_k": (384, 6, "rpe-20.0-cross-ctx-1-k"),
}
TINY = f"deit_tiny_{PRODUCT}_k"
QKV = f"deit_small_{PRODUCT}_qkv"
SMALL = {"img_size": 64, "embed_dim": 32, "num_heads": 2, "depth": 2}


def create(name=QKV, **options):
    return timm.create_model(name, **{**SMALL, **options})


def fill(model):
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lookup_table" in name:
            nn.init.normal_(p, std=0.5)
        elif "qkv.weight" in name:
            nn.init.normal_(p, std=0.2)
    return model


def image(batch=2, size=64):
    torch.manual_seed(2)
    return torch.randn(batch, 3, size, size)


@pytest.mark.parametrize("name", NAMES)
def test_names(name):
    dim, heads, spec = NAMES[name]
    with torch.device("meta"):
        model = timm.create_model(name, depth=2)
    assert (model.embed_dim, model.blocks[0].attn.num_heads) == (dim, heads)
    assert len(timm.create_model(name, embed_dim=24, num_heads=heads).blocks) == 12
    with torch.device("meta"):
        tables = irpe.build_rpe(spec, head_dim=64, num_heads=heads, prefix=1)
    for on, wanted in zip("qkv", tables, strict=True):
        found = getattr(model.blocks[0].attn, f"rpe_{on}")
        assert (found is None) == (wanted is None)
        if wanted is not None:
            shapes = {n: p.shape for n, p in wanted.named_parameters()}
            assert {n: p.shape for n, p in found.named_parameters()} == shapes
    config = model.pretrained_cfg
    assert config["url"] == (
        f"https://github.com/wkcn/iRPE-model-zoo/releases/download/1.0/{name}.pth"
    )
    assert config["input_size"] == (3, 224, 224) and config["num_classes"] == 1000


def test_registered_and_found():
    assert set(timm.list_models("deit_*_ctx_*", module="zoo")) >= set(NAMES)
    assert set(timm.list_models("deit_*_ctx_*")) >= set(NAMES)
    assert set(timm.list_pretrained("deit_*_ctx_*")) >= {f"{name}.in1k" for name in NAMES}
    distilled = {name.replace("_patch16", "_distilled_patch16") for name in NAMES}
    assert set(timm.list_models("deit_*_distilled_*_ctx_*")) == distilled
    assert timm.is_model(TINY)


@pytest.mark.parametrize("name", NAMES)
def test_each_runs_and_learns(name):
    model = create(name, num_classes=7)
    out = model(image())
    assert out.shape == (2, 7)
    fill(model)(image()).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if "lookup" in n)


def test_distilled():
    model = create(QKV.replace("_patch16", "_distilled_patch16"), num_classes=7)
    assert model.num_prefix_tokens == 2
    model.set_distilled_training()
    classes, distilled = fill(model).train()(image())
    assert classes.shape == distilled.shape == (2, 7)
    assert model.eval()(image()).shape == (2, 7)
    # Both prefix tokens share the one extra bucket: the tables keep their size.
    assert model.blocks[0].attn.rpe_k.table.shape == (1, 16, 50)


def test_options_of_the_host():
    assert create(num_classes=0)(image()).shape == (2, 32)
    assert create(num_classes=3, in_chans=1)(torch.randn(1, 1, 64, 64)).shape == (1, 3)
    assert create(drop_path_rate=0.1, attn_drop_rate=0.1).train()(image()).shape == (2, 1000)
    assert create(dynamic_img_size=True)(torch.randn(1, 3, 32, 96)).shape == (1, 1000)
    assert create(rpe_backend="reference").blocks[0].attn.rpe_backend == "reference"
    model = create(rpe="rpe-2.0-cross-ctx-0-q")
    assert model.blocks[0].attn.rpe_k is None and model.blocks[0].attn.rpe_q is not None
    with pytest.raises(irpe.IrpeError, match="prodct"):
        create(rpe="rpe-2.0-prodct-ctx-0-q")
    model = create()
    model.reset_classifier(3)
    assert model(image()).shape == (2, 3)


def test_features_only():
    model = create(features_only=True, depth=4, out_indices=(1, 3)).eval()
    found = model(image())
    assert [f.shape for f in found] == [(2, 32, 4, 4)] * 2
    assert model.feature_info.channels() == [32, 32]
    plain = create(depth=4).eval()
    plain.load_state_dict(model.model.state_dict(), strict=False)
    plain.norm = nn.Identity()
    wanted = plain.forward_intermediates(
        image(), indices=[1, 3], norm=False, intermediates_only=True
    )
    torch.testing.assert_close(found[0], wanted[0])


def test_the_tables_decay_by_default():
    tables = {n for n, _ in create().named_parameters() if "lookup_table" in n}
    assert len(tables) == 6
    assert not tables & create().no_weight_decay()
    skipped = create(table_decay=False).no_weight_decay()
    assert tables <= skipped and {"pos_embed", "cls_token"} <= skipped
    cross = create("deit_small_patch16_224_ctx_cross_56_shared_k", table_decay=False)
    tables = {n for n, _ in cross.named_parameters() if "lookup_table" in n}
    assert len(tables) == 4 and tables <= cross.no_weight_decay()


@pytest.mark.parametrize("layer_decay", [None, 0.7])
@pytest.mark.parametrize("table_decay", [True, False])
def test_optimiser(table_decay, layer_decay):
    model = create(table_decay=table_decay)
    optimiser = create_optimizer_v2(
        model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=layer_decay
    )
    names = {id(p): n for n, p in model.named_parameters()}
    seen = []
    for group in optimiser.param_groups:
        for p in group["params"]:
            seen.append(id(p))
            if "lookup_table" in names[id(p)]:
                assert group["weight_decay"] == (0.05 if table_decay else 0.0)
    assert sorted(seen) == sorted(names)
    if layer_decay:
        scales = {names[id(p)]: g["lr_scale"] for g in optimiser.param_groups for p in g["params"]}
        for block in "01":
            table = f"blocks.{block}.attn.rpe_k.lookup_table_weight"
            assert scales[table] == scales[f"blocks.{block}.attn.qkv.weight"]
    fill(model)(image()).sum().backward()
    optimiser.step()
    assert param_groups_layer_decay(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied):
    model = fill(create()).eval()
    other = copied(model)
    wanted = model(image())
    assert torch.equal(other(image()), wanted) and type(other) is type(model)
    fill(other).blocks[0].attn.rpe_k.table.data.zero_()
    assert torch.equal(model(image()), wanted) and not torch.equal(other(image()), wanted)
    assert other.no_weight_decay() == model.no_weight_decay()


def test_a_checkpoint_of_the_plain_model_names_what_is_missing():
    plain = timm.create_model("deit_tiny_patch16_224", **SMALL)
    missing, unexpected = create().load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and len(missing) == 6 and all("rpe_" in n for n in missing)


class Harmless:
    """Any class that is not argparse.Namespace."""


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder over HTTP on the loopback, and a cache of its own."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    files = tmp_path / "files"
    files.mkdir()
    handler = functools.partial(Quiet, directory=str(files))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield files, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def released(model, file, **more):
    arguments = argparse.Namespace(
        lr=5e-4, model="x", output_dir=None, nested=argparse.Namespace(a=1)
    )
    torch.save({"model": model.state_dict(), "args": arguments, "epoch": 299, **more}, file)


def test_pretrained_from_a_released_file(served):
    """The file holds an argparse.Namespace beside the weights, as the released ones do."""
    files, address = served
    source = fill(create()).eval()
    released(source, files / "model.pth")
    model = create(pretrained=True, pretrained_cfg_overlay={"url": f"{address}/model.pth"}).eval()
    assert torch.equal(model(image()), source(image()))
    for name, p in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], p), name
    # Another number of classes keeps all but the head.
    other = create(
        pretrained=True, num_classes=4, pretrained_cfg_overlay={"url": f"{address}/model.pth"}
    )
    assert other(image()).shape == (2, 4)
    assert torch.equal(other.blocks[1].attn.rpe_v.table, source.blocks[1].attn.rpe_v.table)


def test_pretrained_at_another_size(served):
    """The absolute embedding is resized; the tables are unmodified."""
    files, address = served
    source = fill(create())
    released(source, files / "model.pth")
    overlay = {"url": f"{address}/model.pth"}
    model = create(pretrained=True, img_size=96, pretrained_cfg_overlay=overlay)
    assert model(image(size=96)).shape == (2, 1000)
    assert torch.equal(model.blocks[0].attn.rpe_k.table, source.blocks[0].attn.rpe_k.table)


def test_a_file_with_another_class_is_refused(served):
    files, address = served
    released(create(), files / "model.pth", extra=Harmless())
    with pytest.raises(pickle.UnpicklingError, match="Harmless"):
        create(pretrained=True, pretrained_cfg_overlay={"url": f"{address}/model.pth"})


def test_the_allowance_ends_with_the_call(tmp_path):
    create()
    released(create(), tmp_path / "model.pth")
    with pytest.raises(pickle.UnpicklingError, match="Namespace"):
        torch.load(tmp_path / "model.pth", weights_only=True)


def test_a_file_of_another_architecture_names_keys(served):
    files, address = served
    released(create(TINY), files / "model.pth")
    with pytest.raises(RuntimeError, match="blocks.0.attn.rpe_q.lookup_table_weight"):
        create(pretrained=True, pretrained_cfg_overlay={"url": f"{address}/model.pth"})
