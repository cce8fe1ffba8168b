"""benchmarks/faults.py: runs are really killed, and all resume exactly."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}


def run(*arguments):
    command = [sys.executable, "benchmarks/faults.py", "--no-page", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=False, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tried, survived = re.search(r"(\d+) faults tried, (\d+) survived", done.stdout).groups()
    assert tried == survived
    return int(tried)


def test_a_sample():
    """A kill of each kind; a lost process; and, where file systems can be mounted, full disks."""
    assert run("--scripts", "lm", "--kills", "3") >= 4


@pytest.mark.slow
def test_all():
    assert run() >= 61
