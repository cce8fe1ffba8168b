"""DETR: the official numbers, keys and shapes; padding; specs by layer."""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from common import TILES
from fused import DEVICE
from torch import nn

import irpe
from models.detr import (
    Backbone,
    LearnedPositions,
    SinePositions,
    Transformer,
    build_detr,
    detections,
)
from models.detr.backbone import resized

FIXTURES = Path(__file__).parents[1] / "fixtures"
DETR = torch.load(FIXTURES / "detr.pt", weights_only=True)
KEYS = json.loads((FIXTURES / "detr_keys.json").read_text())
SIZES = ("d_model", "nhead", "num_encoder_layers", "num_decoder_layers", "dim_feedforward")
K = "rpe-2.0-product-ctx-1-k"


def small(enc_rpe2d=None, **given):
    torch.manual_seed(0)
    model = Transformer(24, 3, 2, 2, 32, 0.0, enc_rpe2d=enc_rpe2d, **given).double()
    for name, parameter in model.named_parameters():
        if "lookup_table" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def inputs(height=5, width=7, batch=2):
    torch.manual_seed(1)
    src, pos = torch.randn(2, batch, 24, height, width, dtype=torch.float64)
    return (
        src,
        torch.zeros(batch, height, width, dtype=torch.bool),
        torch.randn(4, 24).double(),
        pos,
    )


@pytest.mark.cases(3)
@pytest.mark.parametrize("backend", ["reference", "eager", *TILES, "sdpa", "triton", "auto"])
@pytest.mark.parametrize("name", DETR["cases"])
def test_official_numbers(name, backend):
    case = DETR["cases"][name]
    model = Transformer(
        *(DETR["arch"][size] for size in SIZES),
        dropout=DETR["arch"]["dropout"],
        normalize_before=case["normalize_before"],
        return_intermediate_dec=case["return_intermediate_dec"],
        enc_rpe2d=case["enc_rpe2d"],
        backend=backend,
    )
    model.load_state_dict(case["state_dict"])
    given = [DETR[key] for key in ("src", "mask", "query_embed", "pos_embed")]
    dtype, device, atol = torch.float64, "cpu", 2e-6
    if backend == "triton":  # computes in float32; layers add up to more of its rounding
        dtype, device, atol = torch.float32, DEVICE, 2e-5
    given = [x.to(device, None if x.dtype == torch.bool else dtype) for x in given]
    hs, memory = model.to(device, dtype).eval()(*given)
    torch.testing.assert_close(hs.float().cpu(), case["hs"], atol=atol, rtol=1e-5)
    torch.testing.assert_close(memory.float().cpu(), case["memory"], atol=atol, rtol=1e-5)


@pytest.mark.parametrize("spec", [key for key in KEYS if key != "note"])
def test_keys_shapes_and_counts(spec):
    model = build_detr(enc_rpe2d=None if spec == "none" else spec)
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    known = KEYS[spec]
    assert len(shapes) == known["n_keys"]
    assert sum(p.numel() for p in model.parameters()) == known["params"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == known["trainable"]
    assert {n: s for n, s in shapes.items() if "rpe" in n} == known["rpe_keys"]
    if known["keys"]:
        assert shapes == known["keys"]


def test_absolute_positions():
    numbers = np.load(FIXTURES / "pos.npz")
    mask = torch.as_tensor(numbers["pos_mask"]).bool()
    for normalize in (False, True):
        wanted = torch.as_tensor(numbers[f"sine_n8_norm{int(normalize)}"])
        assert torch.equal(SinePositions(8, normalize=normalize)(mask), wanted)
    learned = LearnedPositions(8)
    tables = {f"{k}_embed.weight": torch.as_tensor(numbers[f"learned_{k}"]) for k in ("row", "col")}
    learned.load_state_dict(tables)
    assert torch.equal(learned(mask), torch.as_tensor(numbers["learned_n8"]))
    with pytest.raises(irpe.IrpeError, match="51 x 3"):
        learned(torch.zeros(1, 51, 3, dtype=torch.bool))


@pytest.mark.parametrize("pre", [False, True])
def test_encoder_is_torchs_where_nothing_is_added(pre):
    ours = small(normalize_before=pre)
    layer = nn.TransformerEncoderLayer(24, 3, 32, 0.0, batch_first=True, norm_first=pre)
    norm = nn.LayerNorm(24) if pre else None
    theirs = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False).double()
    theirs.load_state_dict(ours.encoder.state_dict())
    src, mask, queries, pos = inputs()
    mask[1, :, 4:] = True
    _, memory = ours(src, mask, queries, torch.zeros_like(pos))
    wanted = theirs(src.flatten(2).mT, src_key_padding_mask=mask.flatten(1))
    torch.testing.assert_close(memory.flatten(2).mT, wanted)


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("spec", [K, "rpe-2.0-cross-ctx-1-qkv", "rpe-1.9-product-bias-0-k", None])
def test_padding_changes_nothing(spec, pre):
    model = small(spec, normalize_before=pre, return_intermediate_dec=True)
    src, mask, queries, pos = inputs()
    mask[0, 3:], mask[1, :, 5:] = True, True
    hs, memory = model(src, mask, queries, pos)
    assert hs.shape == (2, 2, 4, 24) and memory.shape == src.shape
    for image, (height, width) in enumerate([(3, 7), (5, 5)]):
        part = (slice(image, image + 1), slice(None), slice(height), slice(width))
        alone = model(src[part], None, queries, pos[part])
        torch.testing.assert_close(hs[:, image : image + 1], alone[0])
        torch.testing.assert_close(memory[part], alone[1])


@pytest.mark.parametrize("spec", [K, "rpe-2.0-cross-ctx-1-qkv", None])
def test_an_image_of_nothing_but_padding(spec):
    model = small(spec)
    src, mask, queries, pos = inputs()
    mask[1] = True
    first = model.encoder.layers[0].self_attn
    nn.init.zeros_(first.out_proj.bias)
    tokens = src.flatten(2).mT
    out = first(tokens, tokens, tokens, ~mask.flatten(1), irpe.Grid(5, 7))
    assert not out[1].any() and out[0].any()
    hs, memory = model(src, mask, queries, pos)
    (hs.square().sum() + memory.square().sum()).backward()
    assert torch.isfinite(hs).all() and torch.isfinite(memory).all()
    # The biases of the keys move all logits of a query alike, so some gradients may be 0.
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_spec_for_each_layer():
    model = small([None, "rpe-1.9-product-bias-0-k"])
    names = [n for n, _ in model.named_parameters() if "lookup" in n]
    assert names == ["encoder.layers.1.self_attn.rpe_k.lookup_table_bias"]
    with pytest.raises(irpe.IrpeError, match="3 specs.*2 layers"):
        small([K, K, K])


@pytest.mark.parametrize("name", ["dec_rpe2d", "cross_rpe2d"])
def test_object_queries_have_no_place(name):
    with pytest.raises(irpe.IrpeError, match=f"{name}='{K}'.*no positions"):
        small(**{name: K})


def test_sizes_that_come_again_keep_their_ids(monkeypatch):
    model, made = small(K), []
    first = irpe.Grid.positions
    monkeypatch.setattr(
        irpe.Grid, "positions", lambda self, device: made.append(1) or first(self, device)
    )
    for height, width in [(5, 7), (4, 3), (2, 9)]:
        model(*inputs(height, width))
    count = len(made)
    assert count > 0
    for height, width in [(4, 3), (5, 7), (2, 9), (5, 7)]:
        model(*inputs(height, width, batch=1))
    assert len(made) == count


@pytest.mark.full
def test_copies_and_compiled_graphs():
    model = small(K).eval()
    given = inputs()
    wanted = model(*given)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.compile(model, fullgraph=True, backend="aot_eager"),
    ):
        torch.testing.assert_close(other(*given), wanted)


def test_whole_model_and_its_detections():
    torch.manual_seed(0)
    model = build_detr(
        num_classes=5, num_queries=6, backbone="stem", hidden_dim=32, nheads=4,
        enc_layers=1, dec_layers=2, dim_feedforward=32, enc_rpe2d=K,
    )  # fmt: skip
    images = torch.rand(2, 3, 40, 56)
    mask = torch.zeros(2, 40, 56, dtype=torch.bool)
    mask[1, :, 32:] = True
    outputs = model.eval()(images, mask)
    assert outputs["pred_logits"].shape == (2, 6, 6) and outputs["pred_boxes"].shape == (2, 6, 4)
    assert len(outputs["aux_outputs"]) == 1
    sizes = torch.tensor([[40, 56], [400, 560]])
    found = detections(outputs, sizes)
    for image, part in enumerate(found):
        for query in range(6):
            chances = outputs["pred_logits"][image, query].softmax(0)[:5].tolist()
            assert part["labels"][query] == chances.index(max(chances))
            assert part["scores"][query].item() == pytest.approx(max(chances))
            x, y, w, h = outputs["pred_boxes"][image, query].tolist()
            height, width = sizes[image].tolist()
            wanted = [(x - w / 2) * width, (y - h / 2) * height]
            wanted += [(x + w / 2) * width, (y + h / 2) * height]
            assert part["boxes"][query].tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-3)
    nothing = model(images, torch.ones_like(mask))
    assert torch.isfinite(nothing["pred_logits"]).all() and nothing["pred_boxes"].isfinite().all()
    meta = model.to("meta")(images.to("meta"), mask.to("meta"))
    assert meta["pred_boxes"].shape == (2, 6, 4)


def test_boxes_are_not_rounded_in_low_precision():
    torch.manual_seed(0)
    model = build_detr(
        num_classes=5, num_queries=6, backbone="stem", hidden_dim=32, nheads=4,
        enc_layers=1, dec_layers=2, dim_feedforward=32,
    ).eval()  # fmt: skip
    seen = []
    model.bbox_embed.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(torch.rand(1, 3, 40, 56))
    assert outputs["pred_boxes"].dtype == torch.float32
    wanted = model.bbox_embed(seen[0].float()).sigmoid()[-1]
    torch.testing.assert_close(outputs["pred_boxes"], wanted)
    # Sizes are no numbers for bfloat16 either: it knows no 1333.
    sizes = torch.tensor([[801, 1333]])
    low = {key: outputs[key].bfloat16() for key in ("pred_logits", "pred_boxes")}
    wanted = detections({key: value.double() for key, value in low.items()}, sizes)[0]
    for key, value in detections(low, sizes)[0].items():
        torch.testing.assert_close(value, wanted[key].to(value))
        assert key == "labels" or value.dtype == torch.float32


def test_backbones():
    frozen = Backbone("resnet18").train()
    before = {k: v.clone() for k, v in frozen.state_dict().items()}
    frozen(torch.rand(2, 3, 64, 96)).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in frozen.state_dict().items())
    assert frozen.body.conv1.weight.grad is None
    assert frozen.body.layer2[0].conv1.weight.grad is not None
    assert frozen(torch.rand(1, 3, 64, 96)).shape == (1, 512, 2, 3)
    stem = Backbone("stem", width=48)
    assert sum(isinstance(layer, nn.Conv2d) for layer in stem.body) == 3 and stem.stride == 8
    assert stem(torch.rand(1, 3, 37, 64)).shape == (1, 48, 5, 8)
    with pytest.raises(irpe.IrpeError, match="resnet5000"):
        Backbone("resnet5000")


@pytest.mark.parametrize("dilation", [False, True])
def test_resnet_is_torchvisions(dilation):
    """Of which the released weights are."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(
        norm_layer=torchvision.ops.FrozenBatchNorm2d,
        replace_stride_with_dilation=[False, False, dilation],
    )
    for name, numbers in theirs.named_buffers():
        nn.init.uniform_(numbers, 0.5, 1.5 if name.endswith("var") else 1.0)
    ours = Backbone("resnet50", dilation=dilation)
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    ours.body.load_state_dict(state)
    images = torch.randn(1, 3, 65, 97)
    wanted = images
    for name, module in theirs.named_children():
        if name not in ("avgpool", "fc"):
            wanted = module(wanted)
    assert wanted.shape[2:] == ((5, 7) if dilation else (3, 4)) and wanted.std() > 0.1
    torch.testing.assert_close(ours(images), wanted)


def test_without_a_network_there_are_no_weights(monkeypatch):
    def refused(*given, **options):
        raise FileNotFoundError("no connection, nothing in the cache")

    monkeypatch.setattr("timm.create_model", refused)
    with pytest.raises(irpe.IrpeError, match="'resnet50' cannot be built.*no connection"):
        Backbone("resnet50", pretrained=True)


@pytest.mark.parametrize("size", [(3, 4), (7, 5), (1, 1), (13, 20)])
def test_a_mask_is_resized_to_the_nearest_pixel_before(size):
    torch.manual_seed(0)
    mask = torch.rand(2, 13, 20) < 0.5
    found = resized(mask, size)
    assert found.shape == (2, *size) and found.dtype == torch.bool
    for y in range(size[0]):
        for x in range(size[1]):
            assert torch.equal(found[:, y, x], mask[:, y * 13 // size[0], x * 20 // size[1]])
