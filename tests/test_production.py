"""What becomes of a model after training: files, exporters, quantisation, copies.

Each line of docs/production.md names its test, here or in tests/test_transforms.py.
"""

import copy
import io
import pickle
import warnings

import pytest
import torch
from families import FAMILIES, QKV, build, run
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models import VisionTransformer as TorchVit

import irpe

SPEC = "rpe-1.9-product-ctx-1-qkv"
GRID = irpe.Grid(4, 4, prefix=1)
OLD = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Layers(nn.Module):
    """A model of one's own."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 16, 16)
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.layers = nn.ModuleList(irpe.RPEAttention(32, 2, SPEC, prefix=1) for _ in range(2))

    def forward(self, image):
        x = self.patches(image)
        grid = irpe.Grid(*x.shape[-2:], prefix=1)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x.flatten(2).mT), 1)
        for layer in self.layers:
            x = x + layer(x, grid)
        return x


class Encoder(nn.Module):
    """torch's encoder, which is told where its tokens are."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 16, 16)
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, image):
        x = self.patches(image)
        with irpe.located(irpe.Grid(*x.shape[-2:])):
            return self.encoder(x.flatten(2).mT)


def attached(make):
    model = make()
    irpe.attach(model, SPEC)
    return model


def vit():
    small = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return VisionTransformer(**small, num_classes=5)


def swin():
    small = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depths": (2,), "num_heads": (2,)}
    return SwinTransformer(**small, window_size=4, num_classes=5, drop_path_rate=0.0)


def torch_vit():
    return TorchVit(64, 16, 2, 2, 32, 64, num_classes=5)


MODELS = {
    "layers": Layers,
    "timm": lambda: attached(vit),
    "swin": lambda: attached(swin),
    "torchvision": lambda: attached(torch_vit),
    "encoder": lambda: attached(Encoder),
}
EACH = pytest.mark.parametrize("name", MODELS)


def trained(model):
    """A model whose tables, and whose head, are not zero any more."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lookup_table" in name or "head" in name:
                parameter.normal_(std=0.5)
    return model.eval()


def made(name):
    return trained(MODELS[name]())


def images(name, batch=3):
    side = 32 if name == "swin" else 64
    return torch.randn(batch, 3, side, side)


def close(found, wanted, by=1e-5):
    torch.testing.assert_close(found, wanted, rtol=by, atol=by)


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", ["layers", "swin", "encoder"])
def test_exported_file(name):
    """torch.export for any batch, saved and loaded; made with one batch, run with another."""
    model, x = made(name), images(name)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    found = torch.export.load(file).module()
    for batch in (1, 3, 5):
        other = images(name, batch)
        close(found(other), model(other))


def session(program):
    onnxruntime = pytest.importorskip("onnxruntime")
    file = io.BytesIO()
    program.save(file)
    made = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return lambda x: torch.tensor(made.run(None, {made.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.full
@pytest.mark.parametrize(("name", "opset"), [("timm", 18), ("swin", 20)])
def test_onnx_for_any_batch(name, opset):
    pytest.importorskip("onnxscript")
    model, x = made(name), images(name)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    options = {"dynamic_shapes": shapes, "opset_version": opset, "verbose": False}
    program = torch.onnx.export(model, (x,), dynamo=True, **options)
    assert program.model.opset_imports[""] == opset
    call = session(program)
    for batch in (1, 4):
        other = images(name, batch)
        close(call(other), model(other).detach(), 1e-4)


@pytest.mark.cases(1)
@OLD
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@EACH
def test_trace(name):
    """torch.jit.trace, saved and loaded; the batch may be another one, the image's size not."""
    model, x = made(name), images(name)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, x, check_trace=False), file)
    file.seek(0)
    found = torch.jit.load(file)
    for batch in (1, 3):
        other = images(name, batch)
        close(found(other), model(other))


@OLD
def test_script_is_refused_by_torch():
    with pytest.raises(Exception, match="support|source"):
        torch.jit.script(irpe.RPEAttention(32, 2, SPEC, prefix=1))


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", ["timm", "encoder"])
def test_compiled_for_any_batch(name):
    """One graph for all batches."""
    model, graphs = made(name), []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=counted)
    for batch in (2, 3, 5):
        x = images(name, batch)
        torch._dynamo.mark_dynamic(x, 0)
        close(compiled(x), model(x))
    assert len(graphs) == 1


def test_compiled_for_any_grid():
    layer, graphs = trained(irpe.RPEAttention(32, 2, SPEC, prefix=1)), []

    def call(x, height, width):
        return layer(x, irpe.Grid(height, width, prefix=1))

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counted)
    for batch, height, width in ((2, 3, 4), (3, 5, 7), (2, 6, 6), (5, 2, 9)):
        x = torch.randn(batch, 1 + height * width, 32)
        close(compiled(x, height, width), call(x, height, width))
    assert len(graphs) == 1


@pytest.mark.slow
def test_ahead_of_time(tmp_path):
    """AOTInductor: a package that runs without Python."""
    model, x = made("timm"), images("timm")
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        file = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        close(torch._inductor.aoti_load_package(file)(x), model(x))


@EACH
def test_safetensors(name, tmp_path):
    files = pytest.importorskip("safetensors.torch")
    model, x = made(name), images(name)
    files.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    other = MODELS[name]().eval()
    other.load_state_dict(files.load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(other(x), model(x))


@EACH
def test_weights_only_file(name):
    model, x = made(name), images(name)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = MODELS[name]().eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@EACH
def test_copies(name, copied):
    model, x = made(name), images(name)
    wanted = model(x)
    other = copied(model)
    assert torch.equal(other(x), wanted)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(model(x), wanted)
    if name != "layers":
        irpe.detach(other)
        assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", ["layers", "timm", "torchvision", "encoder"])
def test_meta_then_load(name, assign):
    model, x = made(name), images(name)
    with torch.device("meta"):
        other = MODELS[name]().eval()
    assert all(p.is_meta for p in other.parameters())
    if not assign:
        other = other.to_empty(device="cpu")
    other.load_state_dict(model.state_dict(), assign=assign)
    assert torch.equal(other(x), model(x))


def test_meta_then_load_where_timm_has_buffers_to_fill():
    model, x = made("swin"), images("swin")
    with torch.device("meta"):
        other = MODELS["swin"]().eval()
    other = other.to_empty(device="cpu")
    for module in other.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


@EACH
def test_gradients_of_each_sample_and_ensembles(name):
    """torch.func over parameters: what one backward pass gives, sample by sample."""
    model, x = made(name), images(name, 2)
    weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(weights, x):
        return torch.func.functional_call(model, (weights, buffers), (x,)).square().sum()

    each = torch.func.vmap(torch.func.grad(lambda w, x: loss(w, x[None])), in_dims=(None, 0))
    found = each(weights, x)
    for b in range(2):
        model.zero_grad()
        loss(weights, x[b : b + 1]).backward()
        for key, parameter in weights.items():
            wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(found[key][b], wanted, rtol=1e-3, atol=1e-3, msg=key)
    assert any("lookup_table" in k and g.abs().max() > 0 for k, g in found.items())
    both = {k: torch.stack((p, 0.9 * p)) for k, p in weights.items()}
    members = torch.func.vmap(lambda w: loss(w, x))(both)
    close(members[0], loss(weights, x), 1e-4)
    close(members[1], loss({k: 0.9 * p for k, p in weights.items()}, x), 1e-4)


def quantised(model, qkv=True):
    """int8 Linear layers, made by torch; ``qkv``: those that project to q, k and v too."""
    quantization = pytest.importorskip("torch.ao.quantization")
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    chosen = [n for n in names if qkv or not n.endswith("qkv")]
    how = dict.fromkeys(chosen, quantization.default_dynamic_qconfig)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao moves to a package of its own
        return quantization.quantize_dynamic(model, how, torch.qint8)


def layers_in_int8(model):
    return sum("quantized" in type(m).__module__ for m in model.modules())


def near(found, wanted):
    """Within a tenth of the largest number: what int8 costs, and no term left out."""
    assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()


@pytest.mark.cases(3)
@pytest.mark.parametrize("order", ["attach first", "quantise first"])
@EACH
@torch.no_grad()
def test_int8(name, order):
    """Attach, load and quantise, or quantise and attach: the tables stay in float32."""
    model, x = made(name), images(name)
    wanted = model(x)
    if order == "attach first" or name == "layers":
        other = quantised(model)
    else:
        plain = copy.deepcopy(model)
        irpe.detach(plain)
        other = quantised(plain)
        before = None if name == "encoder" else other(x)  # torch's own fast path fails on int8
        irpe.attach(other, SPEC)
        if before is not None:
            close(other(x), before)  # tables are zero at first
        tables = {k: v for k, v in model.state_dict().items() if "lookup_table" in k}
        for key, parameter in other.named_parameters():
            if key in tables:
                parameter.copy_(tables.pop(key))
        assert not tables
    assert layers_in_int8(other) and not layers_in_int8(model)
    near(other(x), wanted)


@torch.no_grad()
def test_int8_inputs_that_differ():
    """Position-infused attention projects queries and keys of inputs that values have not."""
    layer = irpe.RPEAttention(32, 2, "pia", prefix=0).eval()
    x, text = torch.randn(2, 9, 32), irpe.Sequence(9)
    near(quantised(layer)(x, text), layer(x, text))


READERS = ("eva", "beit", "swin v2")
LIKE_READERS = ("eva, no rotary", "eva post norm", "beit, shared bias")


@pytest.mark.cases(6)
@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in (*READERS, *LIKE_READERS)])
@torch.no_grad()
def test_int8_families(name):
    """Every supported family of timm: both orders run."""
    family = FAMILIES[name]
    model = build(family).eval()
    other = quantised(model)
    irpe.attach(other, QKV, where=family.where)
    assert run(other, family).isfinite().all()
    irpe.detach(other)
    irpe.attach(model, QKV, where=family.where)
    assert run(quantised(model), family).isfinite().all()


@pytest.mark.parametrize("name", READERS)
@torch.no_grad()
def test_int8_where_timm_reads_the_weight(name):
    """Refused in one line that says what to do; and that works."""
    family = FAMILIES[name]
    model = build(family).eval()
    with pytest.raises(irpe.IrpeError, match="named qkv from quantisation"):
        irpe.attach(quantised(model), QKV, where=family.where)
    irpe.attach(model, QKV, where=family.where)
    with pytest.raises(irpe.IrpeError, match="named qkv from quantisation"):
        run(quantised(model), family)
    other = quantised(model, qkv=False)
    assert layers_in_int8(other)
    near(run(other, family), run(model, family))


@OLD
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_int8_traced():
    model, x = quantised(made("timm")), images("timm")
    traced = torch.jit.trace(model, x, check_trace=False)
    close(traced(x), model(x))
    assert traced(x[:1]).shape == (1, 5)
