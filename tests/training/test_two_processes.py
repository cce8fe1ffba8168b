"""Two processes over gloo: every sample evaluated once, one run folder, the same weights."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from cls_command import ROOT, TINY


def launch(processes: int, *arguments: str) -> str:
    """Run train_cls.py as a launcher would, and return what the processes printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(processes):
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
        if processes > 1:
            environment |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(processes),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            }
        command = [sys.executable, str(ROOT / "train_cls.py"), *TINY, "--run.device=cpu"]
        running.append(
            subprocess.Popen(
                [*command, *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0] * processes, outputs
    return "".join(outputs)


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path: Path):
    """An even batch without mixing: the same steps, so the same figures up to rounding."""
    # The held-out 360 do not divide into batches of 7, nor these into two equal halves.
    arguments = ["--eval_batch_size=7", "--optim.opt=sgd", "--optim.lr=0.1"]
    records = []
    for processes in (1, 2):
        name = f"of{processes}"
        output = launch(
            processes, *arguments, f"--run.output={tmp_path}", f"--run.experiment={name}"
        )
        assert output.count("run folder:") == 1
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        records.append([json.loads(line) for line in lines])
    one, two = records
    assert [record["count"] for record in two] == [360, 360]
    assert [record["step"] for record in two] == [record["step"] for record in one]
    for key in ("loss", "train_loss", "top1", "top5"):
        for a, b in zip(one, two, strict=True):
            assert b[key] == pytest.approx(a[key], rel=1e-4), key
    assert sorted(path.name for path in tmp_path.iterdir()) == ["of1", "of2"]
