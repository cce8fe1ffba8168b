"""Processes that load data are killed: the run ends with one clear line, and resumes."""

import multiprocessing
import os
import signal
import time

import pytest
from run_files import newest_state
from torch.utils.data import DataLoader, Dataset

from training.data.loaders import batches_of
from training.data.seeded import SeededDataset
from training.errors import Interrupted, UserError
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


class Failing(Dataset):
    """Reads numbers; the fourth one raises, or ends the process."""

    def __init__(self, error: Exception | int) -> None:
        self.error = error

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        if index == 3:
            if isinstance(self.error, int):
                os.kill(os.getpid(), self.error)
            raise self.error
        return index

    def set_epoch(self, epoch: int) -> None:
        pass


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (RuntimeError("a bug"), RuntimeError, "a bug"),
        (ValueError("another bug"), ValueError, "another bug"),
        (RuntimeError("DataLoader worker of a friend"), RuntimeError, "friend"),
        (MemoryError("57 GB"), MemoryError, "57 GB"),
        (UserError("data.mean: has 3 values"), UserError, "^data.mean: has 3 values$"),
        (signal.SIGKILL, Interrupted, "died .DataLoader worker"),
    ],
)
def test_an_error_in_a_process_is_raised_as_itself(error, kind, text):
    loader = DataLoader(Failing(error), batch_size=2, num_workers=1)
    with pytest.raises(kind, match=text) as caught:
        list(batches_of(loader, 0))
    assert type(caught.value) is kind and ("died" in str(caught.value)) == (kind is Interrupted)


def test_grey_images_for_a_model_of_three_channels(cls):
    more = ["--model.in_chans=3", "--data.mean=[0.3,0.3,0.3]", "--data.std=[0.3,0.3,0.3]"]
    status, _, err = cls(*more, "--epochs=1", "--data.workers=1")
    assert status == 0, err
    status, _, err = cls("--model.in_chans=2")
    assert status == 2 and "model.in_chans: 2" in err
