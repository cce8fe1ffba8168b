"""Who may import whom, as a table over the import statements; and irpe without its options."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import irpe

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "irpe"

# part -> the parts of irpe that it may import
ALLOWED = {
    "errors": set(),
    "fields": {"errors"},
    "spec": {"errors", "fields"},
    "cache": set(),
    "geometry": {"errors", "cache"},
    "buckets": {"errors", "geometry"},
    "terms": {"errors", "buckets"},
    "encodings": {"errors", "fields", "spec", "geometry", "buckets", "terms"},
    "backends": {"errors", "cache", "geometry", "buckets", "terms"},
    "functional": {"errors", "terms", "backends"},
    "layers": {"errors", "spec", "geometry", "encodings", "backends", "functional"},
    "linear": {"errors", "geometry", "encodings", "backends"},
    "hosts": {"errors", "spec", "geometry", "terms", "encodings", "backends", "functional"},
    "groups": {"errors", "encodings"},
    "files": {"errors", "encodings", "geometry", "hosts"},
    "zoo": {"encodings", "hosts"},
    "tools": {
        "errors",
        "spec",
        "geometry",
        "terms",
        "buckets",
        "backends",
        "encodings",
        "files",
        "functional",
        "hosts",
        "zoo",
    },
    "__main__": {"tools"},
}
OPTIONAL = {
    "timm": {"hosts/timm/", "zoo.py", "tools/models.py"},
    "torchvision": {"hosts/torchvision.py"},
    "transformers": {"hosts/transformers"},
    "triton": {"backends/triton/"},
}


def imports(path):
    """Modules that a file imports, relative ones written out in full."""
    package = ("irpe", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            if module == "irpe" and node.level:
                yield from (f"irpe.{alias.name}" for alias in node.names)
            elif node.level and not node.module:
                yield from (f"{module}.{alias.name}" for alias in node.names)
            else:
                yield module


def test_direction_of_imports():
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        seen.add(part)
        for module in imports(path):
            if module.startswith("irpe."):
                other = module.split(".")[1]
                assert other == part or other in ALLOWED[part], f"{path}: imports {module}"
            assert module.split(".")[0] not in ("models", "training", "tests"), path
    assert seen == set(ALLOWED)


def test_optional_libraries_stay_in_their_files():
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        for module in imports(path):
            allowed = OPTIONAL.get(module.split(".")[0])
            fine = allowed is None or any(name.startswith(start) for start in allowed)
            assert fine, f"{name} imports {module}"


@pytest.mark.parametrize("folder", ["models", "training"])
def test_scripts_use_public_names(folder):
    private = []
    for path in [*(ROOT / folder).rglob("*.py"), *ROOT.glob("train_*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            # irpe.tools is for people, files reads those of others; the rest is on irpe
            private += [n for n in names if n.startswith("irpe.") and n.split(".")[1] != "zoo"]
    assert not [n for n in private if not n.startswith(("irpe.tools", "irpe.files"))]


def test_backends_share_only_the_call_and_the_reference():
    folder = PACKAGE / "backends"
    computing = {"eager", "sdpa", "triton"}
    assert {p.stem for p in folder.iterdir()} - {"__init__", "__pycache__"} == computing | {
        "call", "registry", "reference"
    }  # fmt: skip
    for path in folder.rglob("*.py"):
        name = path.relative_to(folder).parts[0].removesuffix(".py")
        for module in imports(path) if name in computing else ():
            other = module.removeprefix("irpe.backends.").split(".")[0]
            assert other == name or other not in computing, f"{path} imports {module}"


def test_irpe_runs_without_timm_torchvision_and_triton():
    code = """
import sys, torch  # torch looks for triton by itself
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"timm", "torchvision", "transformers", "triton", "matplotlib"}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocker())
import irpe
grid = irpe.Grid(3, 4, prefix=1)
layer = irpe.RPEAttention(24, 2, "rpe-1.9-product-ctx-1-qkv", backend="reference", prefix=1)
layer(torch.randn(1, 13, 24), grid).sum().backward()
assert layer.rpe_v.lookup_table_weight.grad is not None
try:
    irpe.attach(torch.nn.Linear(2, 2), "rpe-1.9-product-ctx-1-k")
except irpe.IrpeError:
    print("fine")
"""
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip() == "fine", done.stderr


def modules_after(code):
    """What is imported once some code has run."""
    run = [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_import_is_light():
    """Its names bring torch and nothing else; the tools that nobody called stay away too."""
    found = modules_after("import irpe; [getattr(irpe, name) for name in irpe.__all__]")
    assert "torch" in found
    others = {"timm", "torchvision", "transformers", "triton", "matplotlib", "fvcore", "PIL"}
    assert not others & found
    assert not [name for name in found if name.startswith("irpe.tools")]


@pytest.mark.parametrize(
    "code",
    [
        "import irpe; irpe.IrpeError; irpe.Spec; irpe.fields.count(1); dir(irpe)",
        "from irpe.tools.command import main; main([])",
        "from irpe.tools.command import main\ntry: main(['buckets'])\nexcept SystemExit: pass",
        "from irpe.tools.command import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    ],
    ids=["import", "nothing", "wrong", "help"],
)
def test_what_needs_no_torch_imports_none(code):
    assert not {"torch", "numpy", "matplotlib"} & modules_after(code)


def test_public_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    typed = {  # what a type checker sees
        alias.name: node.module
        for part in tree.body
        if isinstance(part, ast.If)
        for node in part.body
        for alias in node.names
    }
    assert sorted(typed) == sorted(irpe.__all__)
    for name, home in typed.items():
        if home is not None:  # fields and linear are public as a whole
            assert getattr(irpe, name) is getattr(importlib.import_module(f"irpe.{home}"), name)
    assert set(irpe.__all__) <= set(dir(irpe))
    space = {}
    exec("from irpe import *", space)
    assert set(irpe.__all__) <= set(space)
    with pytest.raises(AttributeError, match="'irpe' has no attribute 'atention'"):
        irpe.atention  # noqa: B018
