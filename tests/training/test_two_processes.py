"""Two processes over gloo: every sample evaluated once, one run folder, the same weights."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cls_command import ROOT, TINY
from lm_command import TINY as TEXT
from processes import launch, start
from run_files import newest_state, records

from irpe.files.read import read_weights
from training.errors import script


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path: Path):
    """An even batch without mixing: the same steps, so the same results up to rounding."""
    # The held-out 360 do not divide into batches of 7, nor these into two equal halves.
    arguments = ["--eval_batch_size=7", "--optim.opt=sgd", "--optim.lr=0.1"]
    records = []
    for processes in (1, 2):
        name = f"of{processes}"
        folder = [f"--run.output={tmp_path}", f"--run.experiment={name}"]
        command = [*TINY, "--run.device=cpu", *arguments, *folder]
        output = "".join(launch(processes, ROOT / "train_cls.py", *command))
        assert output.count("run directory:") == 1
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        records.append([json.loads(line) for line in lines])
    one, two = records
    assert [record["count"] for record in two] == [360, 360]
    assert [record["step"] for record in two] == [record["step"] for record in one]
    for key in ("loss", "train_loss", "top1", "top5"):
        for a, b in zip(one, two, strict=True):
            assert b[key] == pytest.approx(a[key], rel=1e-4), key
    assert sorted(path.name for path in tmp_path.iterdir()) == ["of1", "of2"]


@pytest.mark.slow
def test_accelerate_launch_and_torchrun_are_one(tmp_path: Path):
    """The same weights, bit for bit. On a CPU, accelerate must be told that these are GPUs."""
    launchers = {
        "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
        + ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"],
        "torchrun": ["torch.distributed.run", "--nproc_per_node=2"],
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    made = []
    for name, launcher in launchers.items():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        output = [f"--run.output={tmp_path}", f"--run.experiment={name}", "--run.device=cpu"]
        ports = {"accelerate": "main_process_port", "torchrun": "master_port"}
        command = [sys.executable, "-m", *launcher, f"--{ports[name]}={port}"]
        command += [str(ROOT / "train_cls.py"), *TINY, *output, "--epochs=1"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("run directory:") == 1
        made.append(read_weights(tmp_path / name / "checkpoints" / "last.safetensors"))
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])


def test_a_script_leaves_its_group(tmp_path: Path):
    @script
    def main(argv):
        dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)

    assert main() == 0
    assert not dist.is_initialized()


def test_a_signal_to_one_stops_both_and_one_goes_on_alone(lm, book, tmp_path: Path):
    """In mid-epoch; the sums so far of both processes are in the results of the one process."""
    options = ["--epochs=2", "--steps_per_epoch=400", "--encoding=alibi", "--optim.opt=sgd"]
    options += ["--sample=0", "--run.device=cpu", "--run.eval_every=2"]
    given = [*TEXT, *options, f"--data.root={book}", f"--run.output={tmp_path / 'runs'}"]
    folder = tmp_path / "runs" / "x"
    running = start(2, ROOT / "train_lm.py", *given, "--run.experiment=x")
    try:
        while not (folder / "progress.json").exists():  # it is there after the first step
            assert running[0].poll() is None, running[0].communicate()
            time.sleep(0.05)
        running[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=60)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [143, 143], outputs
    assert "stopped by SIGTERM" in outputs[0] and "stopped" not in outputs[1]
    state = newest_state(folder)
    assert state["epoch"] < 2 and state["totals"]["rows"].shape[0] == 2
    assert lm(*options, "--run.experiment=x", "--resume=auto")[0] == 0
    assert lm(*options, "--run.experiment=y")[0] == 0
    both, one = records(folder), records(tmp_path / "runs" / "y")
    assert [record["epoch"] for record in both] == [1, 2]
    for a, b in zip(both, one, strict=True):
        assert a["step"] == b["step"]
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
    assert both[1]["loss"] == pytest.approx(one[1]["loss"], rel=1e-4)
