"""A run folder has one writer at a time, and a failed start leaves none."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from training.errors import UserError
from training.run_directory import RunDirectory, running

HOLD = "import os, sys; from training.run_directory import RunDirectory; from pathlib import Path; "
HOLD += "folder = RunDirectory(Path(sys.argv[1])); "


def test_a_run_that_is_alive_is_refused(tmp_path: Path):
    command = [sys.executable, "-c", HOLD + "print(flush=True); input()", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        try:
            assert running(tmp_path)
            with pytest.raises(UserError, match="is in progress") as caught:
                RunDirectory(tmp_path)
            for part in (f"process {other.pid}", socket.gethostname(), str(tmp_path), "since 20"):
                assert part in str(caught.value)
        finally:
            other.communicate(b"\n")
    RunDirectory(tmp_path).close()


@pytest.mark.cases(1)
@pytest.mark.parametrize("end", ["os._exit(1)", "os.kill(os.getpid(), 9)", "folder.close()"])
def test_the_lock_of_a_process_that_is_gone_is_taken_over(tmp_path: Path, end: str):
    subprocess.run([sys.executable, "-c", HOLD + end, str(tmp_path)])
    assert not running(tmp_path)
    RunDirectory(tmp_path).close()
    assert not list(tmp_path.iterdir())


def test_resume_never_takes_a_run_in_progress(cls, tmp_path: Path):
    runs = tmp_path / "runs"
    given = ["--run.experiment=x", "--epochs=1"]
    assert cls(*given)[0] == 0
    os.remove(runs / "x" / "progress.json")  # as if it had not ended
    held = RunDirectory(runs / "x")
    status, _, err = cls(*given, f"--resume={runs / 'x'}")
    assert status == 2 and f"process {os.getpid()}" in err
    status, out, err = cls(*given, "--resume=auto")
    assert status == 0 and f"run directory: {runs / 'x-2'}" in out, err
    held.close()
    status, out, _ = cls(*given, "--resume=auto")
    assert status == 0 and f"run directory: {runs / 'x'}\n" in out


@pytest.mark.parametrize(
    "wrong",
    [
        ["--model.num_classes=7"],
        ["--eval-only", "--sizes=8", "--checkpoint=/nowhere.pth"],
        ["--aug.aa=rnd-m9"],
        ["--sched.warmup_epochs=2", "--optim.opt=adamx"],
    ],
)
def test_a_failed_start_leaves_no_folder(cls, tmp_path: Path, wrong: list[str]):
    status, _, err = cls(*wrong)
    assert status == 2, err
    assert not list((tmp_path / "runs").glob("*"))
