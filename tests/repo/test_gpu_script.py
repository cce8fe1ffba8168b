"""benchmarks/gpu.sh: later stages run after a failure, within their time, and keep their files."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = ["tiny", "tests", "attention", "models", "encoder", "profile", "sanitizer"]
# Stands for Python: notes how it was called; fails in models.py and hangs in layer.py.
PYTHON = """#!/bin/sh
echo "$PYTHONPATH $*" >> {folder}/calls
echo "output of $*"
case "$*" in *--encoder*) exit 0 ;; *models.py*) exit 3 ;; *layer.py*) sleep 600 ;; esac
"""


@pytest.fixture
def run(tmp_path):
    python = tmp_path / "python"
    python.write_text(PYTHON.format(folder=tmp_path))
    python.chmod(0o755)

    def run(*arguments):
        command = [ROOT / "benchmarks" / "gpu.sh", "-p", python, "-o", tmp_path / "out"]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        return subprocess.run(
            [*command, *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path,
            env=environment, timeout=120,
        )  # fmt: skip

    return run


def lines(tmp_path):
    return [line.split() for line in (tmp_path / "out" / "stages.txt").read_text().splitlines()]


def test_a_failure_stops_nothing(run, tmp_path):
    done = run("models", "encoder", "attention")
    assert done.returncode == 1, done.stderr
    assert [(line[0], line[1]) for line in lines(tmp_path)] == [
        ("models", "3"), ("encoder", "0"), ("attention", "0")
    ]  # fmt: skip
    calls = (tmp_path / "calls").read_text().splitlines()
    assert all(call.startswith(f"{ROOT} ") for call in calls)
    assert f"--name {tmp_path}/out/models --minutes 8 --way eager compiled graph" in calls[0]
    for stage in ("models", "encoder", "attention"):
        assert "output of" in (tmp_path / "out" / f"{stage}.log").read_text()


def test_a_stage_keeps_to_its_time(run, tmp_path):
    done = run("-m", "0", "tests", "encoder")  # no time at all
    assert done.returncode == 1 and not (tmp_path / "calls").exists()
    assert [line[:2] for line in lines(tmp_path)] == [["tests", "124"], ["encoder", "124"]]
    script = (ROOT / "benchmarks" / "gpu.sh").read_text()
    short = tmp_path / "benchmarks" / "gpu.sh"  # minutes of a second each
    short.parent.mkdir()
    short.write_text(script.replace("given * 60", "given * 2"))
    command = ["bash", short, "-p", tmp_path / "python", "-o", tmp_path / "out", "-m", "1"]
    done = subprocess.run(
        [*command, "profile", "tests"], capture_output=True, text=True, timeout=60
    )
    assert [line[:2] for line in lines(tmp_path)] == [["profile", "124"], ["tests", "0"]]
    assert "output of" in (tmp_path / "out" / "profile.log").read_text()


def test_all_stages_in_order_and_no_other(run, tmp_path):
    done = run("nothing")
    assert done.returncode == 2 and "no stage nothing: one of tiny tests" in done.stderr
    run("-m", "0")
    assert list(dict.fromkeys(line[0] for line in lines(tmp_path))) == STAGES
    assert run("-x").returncode == 2


def test_every_file_that_it_names_is_there():
    text = (ROOT / "benchmarks" / "gpu.sh").read_text()
    for name in (word.strip("()") for word in text.split()):
        if name.startswith("tests/"):
            assert (ROOT / name).is_file(), name
        if name.endswith(".py") and "/" not in name:
            assert (ROOT / "benchmarks" / name).is_file(), name
