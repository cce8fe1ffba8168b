"""Processes that load data are killed: the run ends with one clear line, and goes on."""

import multiprocessing
import os
import signal
import time

import pytest
from run_files import newest_state

from training.data.seeded import SeededDataset
from training.guards import watched_loader
from training.loop import Loop


def test_a_loader_process_is_killed(cls, tmp_path, monkeypatch):
    main, real = os.getpid(), SeededDataset.__getitem__

    def read(self, key):
        if os.getpid() != main and key[0] == 1 and key[1] % 50 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, key)

    options = ["--run.experiment=x", "--data.workers=2"]
    with monkeypatch.context() as patch:
        patch.setattr(SeededDataset, "__getitem__", read)
        status, _, err = cls(*options)
    assert status == 75
    line = [line for line in err.splitlines() if line.startswith("error: ")][-1]
    assert "a process that loads data died (DataLoader worker" in line
    assert "data.workers" in line
    assert cls(*options, "--resume=auto")[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_of_a_job(number, cls, tmp_path, monkeypatch):
    """As schedulers send it, and a terminal: the step is ended, and a state saved."""
    real = Loop._one_step

    def step(self, *given):
        if self.step == 2:
            for process in multiprocessing.active_children():
                os.kill(process.pid, number)
            os.kill(os.getpid(), number)
            time.sleep(0.5)
        return real(self, *given)

    monkeypatch.setattr(Loop, "_one_step", step)
    status, _, err = cls("--run.experiment=x", "--data.workers=2", "--batch_size=64")
    assert status == 128 + number, err
    assert "in epoch 1, after step 3" in err
    assert newest_state(tmp_path / "runs" / "x")["step"] == 3


def test_other_errors_are_not_touched():
    def batches():
        yield 1
        raise RuntimeError("a bug")

    watched = watched_loader(batches())
    assert next(watched) == 1
    with pytest.raises(RuntimeError, match="a bug"):
        next(watched)
