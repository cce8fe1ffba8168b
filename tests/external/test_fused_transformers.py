"""``attach(native="fuse")`` on transformers' models: what they gave before, without their bias."""

import copy
import pickle

import pytest
import torch
from hosting import everything, losses_stay, outcome, same
from torch import nn

import irpe

transformers = pytest.importorskip("transformers", "5.0", reason='needs pip install -e ".[test]"')

F64 = torch.float64
SAM = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4,
    "image_size": 20, "window_size": 3, "global_attn_indexes": [2], "output_channels": 8,
    "mlp_dim": 32,
}  # fmt: skip
VITDET = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
    "image_size": 20, "window_size": 3, "window_block_indices": [0],
    "use_relative_position_embeddings": True,
}  # fmt: skip
BEIT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "patch_size": 4, "image_size": 12, "use_relative_position_bias": True,
    "layer_scale_init_value": 1.0, "hidden_dropout_prob": 0.0, "drop_path_rate": 0.0,
}  # fmt: skip
SWIN = {
    "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "patch_size": 2, "image_size": 16,
    "window_size": 4, "drop_path_rate": 0.0,
}  # fmt: skip
# Name of the model, its configuration, and the sizes of images that it takes.
MODELS = {
    "sam": ("SamVision", SAM, [(20, 20)]),
    "sam hq": ("SamHQVision", SAM, [(20, 20)]),
    "vitdet": ("VitDet", VITDET, [(20, 20), (12, 28)]),
    "beit": ("Beit", BEIT, [(12, 12), (12, 20), (20, 12)]),
    "beit rectangle": ("Beit", {**BEIT, "image_size": (12, 20)}, [(12, 20), (12, 12)]),
    "swin": ("Swin", SWIN, [(16, 16), (24, 16), (18, 30)]),
    "swin v2": ("Swinv2", SWIN, [(16, 16), (24, 16)]),
}
CASES = [(name, size) for name, (*_, sizes) in MODELS.items() for size in sizes]
NATIVE = ("rel_pos", "relative_position", "continuous_position", "norm")


def made(name, dtype=F64, **more):
    torch.manual_seed(0)
    kind, options, _ = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**options)
    for key, value in more.items():
        setattr(config, key, value)
    model = getattr(transformers, f"{kind}Model")(config).to(dtype)
    for key, parameter in model.named_parameters():
        if any(part in key for part in NATIVE):
            nn.init.normal_(parameter, std=0.5)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def images(size, dtype=F64):
    torch.manual_seed(1)
    return torch.randn(2, 3, *size, dtype=dtype)


def run(model, x):
    more = {"interpolate_pos_encoding": True} if "Swin" in type(model).__name__ else {}
    return model(pixel_values=x, **more).last_hidden_state


def never(*args, **kwargs):
    raise AssertionError("a bias of all pairs")


@pytest.mark.cases(8)
@pytest.mark.parametrize("native", ["fuse", "keep"])
@pytest.mark.parametrize(("name", "size"), CASES)
def test_outputs_and_gradients(name, size, native, monkeypatch):
    model = made(name)
    plain, x = copy.deepcopy(model), images(size)
    spec = None if native == "fuse" else "rpe-1.9-product-ctx-1-k"
    report = irpe.attach(model, spec, native=native)
    wanted = outcome(plain, x, run)
    for module in plain.modules():
        for method in ("get_decomposed_rel_pos", "generate_relative_position_index"):
            if hasattr(type(module), method):
                monkeypatch.setattr(type(module), method, never)
        if "RelativePositionBias" in type(module).__name__:
            monkeypatch.setattr(type(module), "forward", never)
    if native == "keep":
        torch.testing.assert_close(run(model, x), wanted[0], rtol=1e-9, atol=1e-9)
        return
    assert "fused" in str(report) and not report.keys
    assert model.state_dict().keys() == plain.state_dict().keys()
    same(outcome(model, x, run), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", MODELS)
def test_training_has_the_same_losses(name):
    plain, x = made(name), images(MODELS[name][2][0])
    model = copy.deepcopy(plain)
    irpe.attach(model, native="fuse")
    losses_stay(model, plain, lambda one: run(one, x).logsumexp(-1).mean())


@pytest.mark.parametrize("name", MODELS)
def test_detach_restores(name):
    model, x = made(name), images(MODELS[name][2][0])
    wanted = run(model, x)  # Swin's forward pass sets attributes
    before = everything(model)
    irpe.attach(model, native="fuse")
    irpe.detach(model)
    assert everything(model) == before
    assert torch.equal(run(model, x), wanted)


@pytest.mark.parametrize("name", MODELS)
def test_copied_pickled_replaced_and_mapped(name):
    model, x = made(name), images(MODELS[name][2][0])
    irpe.attach(model, native="fuse")
    wanted = run(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(run(other, x), wanted)
    for weights in irpe.attention_maps(model, x).values():
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
    replaced = made(name)
    irpe.attach(replaced, "rpe-1.9-product-ctx-1-k", native="replace")
    assert not torch.allclose(run(replaced, x), wanted)
    run(replaced, x).sum().backward()
    frozen = [key for key, p in replaced.named_parameters() if not p.requires_grad]
    assert frozen and all(any(part in key for part in NATIVE) for key in frozen)


@pytest.mark.parametrize("name", ["sam", "vitdet", "beit", "swin"])
def test_probabilities_of_eager_models(name):
    found = []
    for fuse in (False, True):
        model = made(name).eval()
        model = type(model)._from_config(model.config, attn_implementation="eager").double()
        model.load_state_dict(made(name).state_dict())
        if fuse:
            irpe.attach(model, native="fuse")
        x = images(MODELS[name][2][0])
        found.append(model.eval()(pixel_values=x, output_attentions=True).attentions)
    assert len(found[0]) == len(found[1]) > 0
    same(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_what_cannot_be_fused_is_one_line():
    model = made("beit", use_shared_relative_position_bias=True)
    with pytest.raises(irpe.IrpeError, match="all layers share its relative bias") as caught:
        irpe.attach(model, native="fuse")
    assert "\n" not in str(caught.value)
    with pytest.raises(irpe.IrpeError, match="rotates"):
        irpe.attach(made("sam"), "rope-axial", native="fuse")
    plain = made("beit", use_relative_position_bias=False)
    with pytest.raises(irpe.IrpeError, match="no native encoding"):
        irpe.attach(plain, native="fuse")
    irpe.attach(plain, "rpe-1.9-product-ctx-1-k")


@pytest.mark.parametrize("name", ["sam", "vitdet", "swin", "swin v2"])
@pytest.mark.parametrize("options", [{"spec": "rpe-1.9-product-ctx-1-k"}, {"native": "fuse"}])
def test_older_versions_are_refused(name, options, monkeypatch):
    monkeypatch.setattr("irpe.hosts.transformers.transformers.__version__", "4.57.6")
    model = made(name)
    before = everything(model)
    with pytest.raises(irpe.IrpeError, match=r"needs transformers 5, and this is 4\.57\.6"):
        irpe.attach(model, **options)
    assert everything(model) == before
