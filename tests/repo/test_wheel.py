"""The wheel holds irpe and nothing else, typed."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_wheel_contents(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in ("irpe", "models", "training", "tests"):
        ignore = shutil.ignore_patterns("__pycache__", "fixtures")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"irpe"}
    assert "irpe/py.typed" in names
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "irpe").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
