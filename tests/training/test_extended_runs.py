"""A finished run is extended, a short run shortens its warm-up, and any output is printed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cls_command import ROOT


def rates(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["lr"] for line in lines]


@pytest.mark.full
def test_a_finished_run_is_extended(cls, tmp_path: Path):
    folder = tmp_path / "runs" / "x"
    assert cls("--run.experiment=x", "--epochs=2")[0] == 0
    before = rates(folder)
    for epochs in (1, 2):
        status, _, err = cls("--run.experiment=x", f"--epochs={epochs}", f"--resume={folder}")
        assert status == 2 and "more epochs would extend it" in err
    more = ["--epochs=4", "--run.progress=lines"]
    status, out, err = cls("--run.experiment=x", *more, f"--resume={folder}")
    assert status == 0, err
    assert "extended from 2 to 4 epochs; the learning rate is now that of a run" in err
    assert f"run directory: {folder}\n" in out
    assert yaml.safe_load((folder / "config.yaml").read_text())["epochs"] == 4
    assert cls("--run.experiment=whole", "--epochs=4")[0] == 0
    assert rates(folder) == before + rates(tmp_path / "runs" / "whole")[2:]


@pytest.mark.cases(1)
@pytest.mark.parametrize("warmup", [2, 5])
def test_a_warm_up_longer_than_the_run_is_shortened(cls, warmup: int):
    status, out, err = cls(f"--sched.warmup_epochs={warmup}")
    assert status == 0, err
    assert f"note: sched.warmup_epochs: {warmup} is not below epochs: 2" in out and "for 0.4" in out


@pytest.mark.cases(1)
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_output_that_has_no_such_character(encoding: str):
    code = "from training.errors import script; import sys\n"
    code += "sys.exit(script(lambda argv: print('\\u6771 \\udcff'))())"
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"\\udcff" in done.stdout
