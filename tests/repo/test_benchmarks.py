"""The model benchmark runs whole, on a tiny model, beside a stand-in for the original's file."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

STAND_IN = '''
"""The original's names over irpe's modules."""
from easydict import EasyDict
import irpe


def get_rpe_config(**given):
    return EasyDict(given)


def build_rpe(config, head_dim, num_heads):
    spec = irpe.RPE(ratio=config.ratio, method=config.method, mode=config.mode, on=config.rpe_on)
    modules = irpe.build_rpe(spec, head_dim=head_dim, num_heads=num_heads, prefix=config.skip > 0)
    return [m and (lambda x, m=m: m(x, 10, 10)) for m in modules]
'''


def test_models(tmp_path):
    (tmp_path / "irpe.py").write_text(STAND_IN)
    command = [sys.executable, "benchmarks/models.py", "--model", "test_vit", "--size", "160"]
    command += ["--batch", "1", "--rounds", "2", "--original", str(tmp_path)]
    command += ["--name", str(tmp_path / "figures")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    originals = {"original k", "original qk", "original qkv"}
    assert set(figures["rows"]) == {"plain", "plain again", "k", "qk", "qkv"} | originals
    for name, row in figures["rows"].items():
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"], name
        assert (row["peak_mib"] is None) == (name == "plain again")


def test_without_the_original(tmp_path):
    command = [sys.executable, "benchmarks/models.py", "--original", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert "there is no irpe.py" in done.stderr
