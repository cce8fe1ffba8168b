"""Every number of the official code: bucket ids, attention outputs, gradients, DeiT logits."""

import json
import re

import numpy as np
import pytest
import torch
from common import FIXTURES, TILES

import irpe

IDS = np.load(FIXTURES / "bucket_ids.npz")
ATTENTION = np.load(FIXTURES / "attention.npz")
POSITIONS = np.load(FIXTURES / "pos.npz")
DEIT = torch.load(FIXTURES / "deit.pt", weights_only=True)
ID_CASES = [name for name in IDS.files if not name.endswith("_nb")]
ATTENTION_CASES = [name[: -len("/meta")] for name in ATTENTION.files if name.endswith("/meta")]
MODES = {"contextual": "ctx", "bias": "bias"}


@pytest.mark.parametrize("case", ID_CASES)
def test_bucket_ids(case):
    pattern = r"(euc|quant|product|cross_rows|cross_cols)_h(\d+)_w(\d+)_skip(\d+)_r([\d.]+)"
    method, height, width, skip, ratio = re.fullmatch(pattern, case).groups()
    spec = irpe.parse(f"rpe-{ratio}-{method.split('_')[0]}-ctx-1-k")
    ids, size = irpe.bucket_ids(spec, irpe.Grid(int(height), int(width), prefix=int(skip)))
    if spec.method == "cross":
        ids = ids[method == "cross_cols"]
    assert size == int(IDS[f"{case}_nb"])
    np.testing.assert_array_equal(ids.numpy(), IDS[case])


@pytest.mark.parametrize(
    ("case", "spec"),
    [
        ("pw_long_r1.9", irpe.RPE(ratio=1.9)),
        ("pw_long_r2.0", irpe.RPE(ratio=2.0)),
        ("pw_long_r20", irpe.RPE(ratio=20)),
        ("pw_long_a2_b5_g12", irpe.RPE(alpha=2, beta=5, gamma=12)),
        ("pw_sq_r2.0", irpe.RPE(ratio=2.0)),
        ("pw_sq_r33", irpe.RPE(ratio=33)),
    ],
)
def test_piecewise_index(case, spec):
    offsets = POSITIONS["pw_x"] if "sq" not in case else np.arange(1000)
    found = spec.buckets()[0].index(torch.from_numpy(offsets.astype(np.int64)))
    np.testing.assert_array_equal(found.numpy(), POSITIONS[case].astype(np.int64))


@pytest.mark.cases(40)
@pytest.mark.parametrize("backend", ["reference", "eager", *TILES, "sdpa", "auto"])
@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_attention(case, backend):
    mode, method, on = case.split("_")[:3]
    if backend == "sdpa" and "v" in on:
        pytest.skip("sdpa has no value term; that it raises is tested elsewhere")
    ratio, shared, skip, height, width, heads, dim, _ = ATTENTION[f"{case}/meta"]
    spec = irpe.RPE(ratio=float(ratio), method=method, mode=MODES[mode], shared=bool(shared), on=on)
    modules = irpe.build_rpe(
        spec, head_dim=int(dim), num_heads=int(heads), prefix=int(skip), dtype=torch.float64
    )
    owner = torch.nn.ModuleDict(
        {f"rpe_{name}": m for name, m in zip("qkv", modules, strict=True) if m is not None}
    )
    prefix = f"{case}/table/"
    tables = {n[len(prefix) :]: _tensor(n) for n in ATTENTION.files if n.startswith(prefix)}
    owner.load_state_dict(tables)  # strict: names and shapes are the official ones
    q, k, v, w = (_tensor(f"in_skip{int(skip)}/{name}") for name in "qkvw")
    for x in (q, k, v):
        x.requires_grad_()
    grid = irpe.Grid(int(height), int(width), prefix=int(skip))
    terms = sum((m.terms(grid) for m in owner.values()), ())
    out = irpe.attention(q, k, v, terms, backend=backend)
    (out * w).sum().backward()
    _close(out, f"{case}/out")
    for name, x in (("q", q), ("k", k), ("v", v)):
        _close(x.grad, f"{case}/grad_{name}")
    for name, parameter in owner.named_parameters():
        assert parameter.grad.abs().max() > 0
        _close(parameter.grad, f"{case}/grad_table/{name}")


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("host", ["attach", "models"])
@pytest.mark.parametrize("case", list(DEIT["cases"]))
def test_deit_logits(case, host, backend):
    pytest.importorskip("timm")
    from timm.models.vision_transformer import VisionTransformer

    from models.deit import DeiT

    arch, numbers = DEIT["arch"], DEIT["cases"][case]
    shape = {k: arch[k] for k in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    shape |= {"mlp_ratio": arch["mlp_ratio"], "num_classes": arch["num_classes"]}
    rpe = None
    if numbers["rpe"] is not None:
        given = numbers["rpe"]
        rpe = irpe.RPE(
            ratio=given["ratio"],
            method=given["method"],
            mode=given["mode"],
            shared=given["shared_head"],
            on=given["rpe_on"],
        )
    if host == "attach":
        model = VisionTransformer(**shape)
        if rpe is not None:
            irpe.attach(model, rpe, backend=backend)
    else:
        model = DeiT(**shape, rpe=rpe, backend=backend)
    model.load_state_dict(numbers["state_dict"])
    model.double().eval()
    with torch.no_grad():
        logits = model(DEIT["input"].double())
        features = model.forward_head(model.forward_features(DEIT["input"].double()), True)
    torch.testing.assert_close(logits.float(), numbers["logits"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features.float(), numbers["features"], rtol=1e-5, atol=1e-6)


def test_released_names_and_counts():
    timm = pytest.importorskip("timm")
    import irpe.zoo  # noqa: F401

    numbers = json.loads((FIXTURES / "deit_small_qkv_keys.json").read_text())
    model = timm.create_model(numbers["model"])
    found = {name: list(x.shape) for name, x in model.state_dict().items()}
    assert found == numbers["keys"]
    assert sum(p.numel() for p in model.parameters()) == numbers["params"] == 22_165_864
    for name, other in numbers["other_models"].items():
        model = timm.create_model(name)
        assert sum(p.numel() for p in model.parameters()) == other["params"], name
        state = model.state_dict()
        assert len(state) == other["n_keys"], name
        first = {n: list(x.shape) for n, x in state.items() if n.startswith("blocks.0.attn.rpe")}
        assert first == other["rpe_keys_block0"], name


def _tensor(name):
    return torch.from_numpy(ATTENTION[name]).double()


def _close(found, name):
    torch.testing.assert_close(
        found.detach().float(), torch.from_numpy(ATTENTION[name]), rtol=2e-6, atol=2e-7
    )
