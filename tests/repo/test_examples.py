"""Every example runs as its first lines say, prints what they promise, and is short."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(name, folder, *arguments):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def numbers(pattern, text):
    found = [float(x) for x in re.findall(pattern, text)]
    assert found, text
    return found


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_short_and_explained(path):
    text = path.read_text()
    assert len(text.splitlines()) < 80
    assert f"python examples/{path.name}" in text.split('"""')[1]


def test_every_example_is_run_here():
    assert all(f'run("{path.name}"' in Path(__file__).read_text() for path in EXAMPLES)


@pytest.mark.full
def test_bucket_maps(tmp_path):
    pytest.importorskip("matplotlib")
    run("bucket_maps.py", tmp_path, "maps.png")
    assert (tmp_path / "maps.png").stat().st_size > 10_000


@pytest.mark.full
def test_custom_vit(tmp_path):
    said = run("custom_vit.py", tmp_path)
    losses = numbers(r"loss (\S+)", said)
    assert 1.8 < losses[0] < 3.0 and losses[-1] < 0.5
    assert min(numbers(r"(\S+) % right", said)) > 70  # a tenth would be chance


@pytest.mark.full
def test_finetune_timm(tmp_path):
    said = run("finetune_timm.py", tmp_path)
    assert "outputs stay the same until trained" in said
    assert numbers(r"change of an output: (\S+)", said)[0] < 1e-5
    losses = numbers(r"loss (\S+)", said)
    assert losses[-1] < 0.7 * losses[0]
    assert numbers(r"in the tables: (\S+)", said)[0] > 0.01


def test_text_block(tmp_path):
    said = run("text_block.py", tmp_path)
    assert max(numbers(r": (\S+)\n", said)) < 1e-5


def test_torch_encoder(tmp_path):
    said = run("torch_encoder.py", tmp_path)
    assert numbers(r"fresh tables change outputs by (\S+)", said)[0] < 1e-5
    assert numbers(r"others change them by (\S+)", said)[0] >= 0.1
    assert "on 3x5: [1, 15, 64]" in said and "IrpeError: no grid" in said


@pytest.mark.full
def test_costs(tmp_path):
    pytest.importorskip("fvcore")
    said = run("costs.py", tmp_path)
    assert "(+22.7)" in said and "(+68.1)" in said and "backend " in said


@pytest.mark.full
def test_export_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    said = run("export_onnx.py", tmp_path, "small.onnx")
    assert max(numbers(r"largest difference (\S+)", said)) < 1e-4
