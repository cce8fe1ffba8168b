"""Processes that load data are killed: the run ends with one clear line, and goes on."""

import os
import signal

import pytest

from training.data.seeded import SeededDataset
from training.guards import watched_loader


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


def test_other_errors_are_not_touched():
    def batches():
        yield 1
        raise RuntimeError("a bug")

    watched = watched_loader(batches())
    assert next(watched) == 1
    with pytest.raises(RuntimeError, match="a bug"):
        next(watched)
