"""The kernels compile for GPUs on a machine without one, and those a call can get do not spill."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = {"prepare", "project", "forward", "row_pass", "column_pass", "reduce"}
ARCHS = ("80", "90", "120")
pytest.importorskip("triton")


def test_a_sample_compiles_without_spills():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "variants.py", "--sample", "--arch", *ARCHS],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    for arch in ARCHS:
        assert {name for line in lines if arch in line for name in KERNELS & set(line)} == KERNELS


def test_the_committed_tables_hold_what_auto_can_pick():
    tables = sorted((ROOT / "benchmarks" / "results").glob("variants_triton*.json"))
    assert tables
    for table in tables:
        rows = json.loads(table.read_text())["rows"]
        assert {row["kernel"] for row in rows} >= KERNELS
        assert {row["arch"] for row in rows} == {80, 86, 90, 100, 120}
        picked = [row for row in rows if row["dtype"] != "float32" or row["mode"] == "lookup"]
        assert picked and not [row for row in picked if row["spills"]], table.name
