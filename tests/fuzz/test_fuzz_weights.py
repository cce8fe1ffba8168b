"""Damaged weights files: never a crash of the process, a partial load, or more memory than a file.

IRPE_FUZZ=2000 pytest -m "" tests/fuzz/test_fuzz_weights.py
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_inputs import COUNT

ROOT = Path(__file__).parents[2]


@pytest.mark.full
def test_damaged_weights_files(tmp_path):
    first = random.randrange(10**9) if COUNT else 0
    command = [sys.executable, str(Path(__file__).with_name("weight_files.py"))]
    command += [str(first), str(COUNT or 80), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"from {first} on: {done.stderr[-3000:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    refused = sum(n for what, n in found["outcomes"].items() if what.endswith("refused"))
    loaded = sum(n for what, n in found["outcomes"].items() if what.endswith("loaded"))
    assert refused > 0.5 * (refused + loaded) and loaded > 0, found
    assert found["grown_MiB"] < 100, found  # a bomb unpacked has 64 MiB for each of nine tensors
    print(found)
