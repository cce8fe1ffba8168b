"""An interrupted run resumes exactly."""

import json
from pathlib import Path

import pytest
import torch

from irpe.files.read import read_weights
from training.checkpoint import States
from training.loop import Loop

TIMES = ("seconds", "images_per_second", "train_cpu_seconds")
OPTIONS = ["--epochs=4", "--ema.enabled", "--ema.decay=0.9", "--model.drop_path=0.2"]


def records(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


@pytest.fixture
def interrupted(cls, monkeypatch):
    """Runs a command that is interrupted in the middle of its third epoch."""

    def run(*arguments: str) -> None:
        real = Loop._one_step

        def step(self, *given):
            if self.step >= 12:
                raise KeyboardInterrupt
            return real(self, *given)

        with monkeypatch.context() as patch:
            patch.setattr(Loop, "_one_step", step)
            assert cls(*OPTIONS, *arguments)[0] == 130

    return run


def test_the_same_weights_bit_for_bit(cls, interrupted, tmp_path: Path):
    assert cls(*OPTIONS, "--run.experiment=whole")[0] == 0
    interrupted("--run.experiment=parts", "--run.save_steps=4", "--data.workers=1")
    parts = tmp_path / "runs" / "parts"
    assert len(records(parts)) == 2
    torch.rand(7)  # what ran before must not matter
    status, _, err = cls(
        *OPTIONS,
        "--run.experiment=parts",
        "--resume=auto",
        "--run.progress=lines",
        "--data.workers=1",
    )
    assert status == 0, err
    assert "resuming after epoch 2 and step 12\n" in err
    assert records(parts) == records(tmp_path / "runs" / "whole")
    for name in ("last", "last-ema", "best"):
        one, other = (
            read_weights(tmp_path / "runs" / run / "checkpoints" / f"{name}.safetensors")
            for run in ("whole", "parts")
        )
        assert all(torch.equal(one[key], other[key]) for key in one)
    # Finished: auto begins a new run, and the folder itself is refused.
    assert cls(*OPTIONS, "--run.experiment=parts", "--resume=auto")[0] == 0
    assert (tmp_path / "runs" / "parts-2").is_dir()
    status, _, err = cls(*OPTIONS, f"--resume={parts}")
    assert status == 2
    assert "finished its 4 epochs" in err


def test_records_after_the_state_are_trained_again(cls, interrupted, tmp_path: Path):
    interrupted("--run.experiment=x", "--run.save_every=10")
    folder = tmp_path / "runs" / "x"
    status, _, err = cls(*OPTIONS, f"--resume={folder}")
    assert status == 2
    assert "has no checkpoints/state-*.pt" in err
    interrupted("--run.experiment=y")
    folder = tmp_path / "runs" / "y"
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3}\n')
    status, _, err = cls(*OPTIONS, f"--resume={folder}")
    assert status == 0, err
    assert [record["epoch"] for record in records(folder)] == [1, 2, 3, 4]


def test_another_configuration_or_a_damaged_state_is_refused(cls, interrupted, tmp_path: Path):
    interrupted("--run.experiment=x")
    folder = tmp_path / "runs" / "x"
    status, _, err = cls(*OPTIONS, f"--resume={folder}", "--optim.lr=0.5", "--seed=3")
    assert status == 2
    assert err.count("\n") == 1
    assert "optim.lr (was 0.003, is 0.5)" in err
    assert "seed (was 0, is 3)" in err
    newer, older = States(folder / "checkpoints").paths()
    older.write_bytes(older.read_bytes()[:1000])
    content = bytearray(newer.read_bytes())
    content[len(content) // 2] ^= 1
    newer.write_bytes(content)
    status, _, err = cls(*OPTIONS, f"--resume={folder}")
    assert status == 2
    assert err.count("\n") == 1
    assert all(
        f"{str(path)!r} is truncated or not a training state" in err for path in (newer, older)
    )
