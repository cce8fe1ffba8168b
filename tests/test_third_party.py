"""An encoding and a backend from outside of the package: by their names, everywhere."""

import subprocess
import sys
from pathlib import Path

import pytest

import train_cls
from irpe.tools.command import main
from irpe.tools.plugins import import_plugins

ROOT = Path(__file__).parents[1]

ENCODING = """
from dataclasses import dataclass

import torch

import irpe


@dataclass(frozen=True)
class RowDistance:
    size: int

    def __call__(self, offsets):
        return offsets[..., 0].abs().clamp(max=self.size - 1)


@irpe.register
@dataclass(frozen=True, kw_only=True)
class Rows(irpe.Spec):
    names = {"my-rows": {}}
    axes = (2,)
    neutral = True
    examples = (("my-rows,reach=2", "logit + b[h, |dy|]", "distance in rows"),)
    reach: int = irpe.fields.count(2, always=True)

    def build(self, size):
        return {"my_rows": RowBias(self, size)}


class RowBias(irpe.Encoding):
    def __init__(self, spec, size):
        super().__init__()
        self.spec, self.function = spec, RowDistance(spec.reach + 1)
        n = spec.reach + 1 + (size.prefix > 0)
        table = torch.zeros(size.num_heads, n, device=size.device, dtype=size.dtype)
        self.table = torch.nn.Parameter(table)

    def terms(self, geometry):
        return (irpe.Term("bias", self.table, irpe.BucketIds(self.function, geometry)),)
"""

LIBRARY = """
import itertools, math

import pytest, timm, torch, transformers

import irpe, mine

assert str(irpe.parse("my-rows")) == "my-rows,reach=2"
for wrong in ("my-rows,clip=3", "my-rows,reach=0", "my-rows,reach"):
    with pytest.raises(irpe.IrpeError, match="reach"):
        irpe.parse(wrong)
grid = irpe.Grid(3, 2, prefix=1)
made = irpe.build("my-rows,reach=1", dim=8, num_heads=2, prefix=1, dtype=torch.float64)
module = made["my_rows"]
torch.nn.init.normal_(module.table.requires_grad_(False))
q, k, v = (torch.randn(1, 2, 7, 4, dtype=torch.float64) for _ in range(3))
found = irpe.attention(q, k, v, module.terms(grid))
for h, i in itertools.product(range(2), range(7)):
    weights = []
    for j in range(7):
        n = 2 if 0 in (i, j) else min(abs((i - 1) // 2 - (j - 1) // 2), 1)
        logit = sum(float(q[0, h, i, c] * k[0, h, j, c]) for c in range(4)) / 2
        weights.append(math.exp(logit + float(module.table[h, n])))
    row = sum(w * v[0, h, j] for j, w in enumerate(weights)) / sum(weights)
    torch.testing.assert_close(found[0, h, i], row)

layer = irpe.RPEAttention(32, 2, "my-rows + rope-axial", prefix=1)
layer(torch.randn(1, 7, 32), irpe.Grid(2, 3, prefix=1)).sum().backward()
assert layer.my_rows.table.grad.shape == (2, 4)

small = dict(img_size=64, embed_dim=32, depth=2, num_heads=2, num_classes=3)
vit = timm.create_model("vit_tiny_patch16_224", **small).eval()
config = transformers.ViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
    image_size=64, patch_size=16,
)
for model in (vit, transformers.ViTModel(config).eval()):
    run = lambda: torch.as_tensor(getattr(out := model(image), "last_hidden_state", out))
    image = torch.randn(1, 3, 64, 64)
    before = run()
    report = irpe.attach(model, "my-rows")
    assert "stay the same" in str(report)
    assert set(irpe.specs(model).values()) == {"my-rows,reach=2"} and len(irpe.specs(model)) == 2
    torch.testing.assert_close(run(), before)
    run().square().sum().backward()
    tables = [p for n, p in model.named_parameters() if "my_rows" in n]
    assert len(tables) == 2
    for table in tables:
        assert table.grad.abs().sum() > 0
        torch.nn.init.normal_(table)
    assert (run() - before).abs().max() > 1e-5
    irpe.detach(model)
    torch.testing.assert_close(run(), before)
print("fine")
"""

BACKEND = """
import pytest, torch

import irpe

taken = []


def attention(call):
    taken.append(call.kinds)
    return irpe.attention(call.q, call.k, call.v, call.terms, scale=call.scale, backend="reference")


def unsupported(call):
    return "no masks here" if call.mask is not None else None


q = torch.randn(1, 2, 6, 8)
irpe.register_backend("mine", attention, unsupported=unsupported)
irpe.attention(q, q, q)
assert not taken and "mine" not in irpe.explain(q, q, q)
irpe.attention(q, q, q, backend="mine")
assert len(taken) == 1

rank = lambda call: (200, "because it is mine")
irpe.register_backend("mine", attention, unsupported=unsupported, preference=rank)
assert irpe.explain(q, q, q).splitlines()[1].strip() == "mine: because it is mine"
torch.testing.assert_close(irpe.attention(q, q, q), irpe.attention(q, q, q, backend="reference"))
irpe.RPEAttention(16, 2, "rpe-1.9-product-ctx-1-k")(torch.randn(1, 6, 16), irpe.Grid(2, 3))
assert taken[1:] == [frozenset(), {"query"}]

mask = torch.ones(6, 6, dtype=torch.bool)
assert "not mine: no masks here" in irpe.explain(q, q, q, mask=mask)
irpe.attention(q, q, q, mask=mask)
with pytest.raises(irpe.IrpeError, match="'mine' cannot compute this call: no masks here"):
    irpe.attention(q, q, q, mask=mask, backend="mine")
assert len(taken) == 3
for wrong in ("auto", "my backend", 3):
    with pytest.raises(irpe.IrpeError, match="name"):
        irpe.register_backend(wrong, attention)
print("fine")
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.py").write_text(ENCODING)
    return tmp_path


def run(folder, *words):
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.cases(1)
@pytest.mark.parametrize("code", [LIBRARY, BACKEND], ids=["encoding", "backend"])
def test_in_python(folder, code):
    assert len(ENCODING.strip().splitlines()) <= 60
    (folder / "script.py").write_text(code)
    assert run(folder, "script.py") == "fine\n"


def test_commands(folder):
    (folder / "script.py").write_text("""
from irpe.tools.command import main

plugin = ["--plugin", "mine"]
assert main([*plugin, "specs"]) == 0
assert main([*plugin, "buckets", "my-rows,reach=1", "--grid", "3x2", "--at", "0,0"]) == 0
assert main([*plugin, "explain", "my-rows"]) == 0
""")
    out = run(folder, "script.py")
    assert "my-rows,reach=2             distance in rows\n    logit + b[h, |dy|]\n" in out
    assert "  my-rows     reach=\n" in out
    assert "2 of the table's 2 in use for this query\n[0]0\n 1 1\n 1 1\n" in out
    assert "terms: bias [6, 4]" in out


def test_plugins_that_cannot_be_imported(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("mien", "mine.py", "", ".mine"):
        assert main(["--plugin", name, "specs"]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"error: plugin {name!r} cannot be imported"), told
    assert train_cls.main(["--plugins=[mien]"]) == 2
    assert capsys.readouterr().err.startswith("error: plugin 'mien' cannot be imported")
    (folder / "broken.py").write_text("import absent_module")
    with pytest.raises(ModuleNotFoundError, match="absent_module"):
        import_plugins(["broken"])


@pytest.mark.full
def test_train_cls(folder):
    tiny = [
        "--model.name=vit_tiny_patch16_224", "--model.img_size=8", "--model.in_chans=1",
        "--model.kwargs={patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}",
        "--data.workers=0", "--epochs=1", "--batch_size=512", "--sched.warmup_epochs=0",
        "--run.progress=none", "--run.threads=1", "--rpe=my-rows", "--plugins=[mine]",
    ]  # fmt: skip
    run(folder, ROOT / "train_cls.py", *tiny)
    (config,) = (folder / "runs").glob("*/config.yaml")
    assert "plugins:\n- mine\n" in config.read_text()
