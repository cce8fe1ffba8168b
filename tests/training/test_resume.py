"""An interrupted run resumes exactly."""

from pathlib import Path

import pytest
import torch
from run_files import records, same

from training.checkpoint import States

OPTIONS = ["--epochs=4", "--ema.enabled", "--ema.decay=0.9", "--model.drop_path=0.2"]


@pytest.fixture
def interrupted(cls, stopped):
    """Runs a command that is interrupted in the middle of its third epoch."""

    def run(*arguments: str) -> None:
        with stopped(12):
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
    assert same(tmp_path / "runs" / "whole", parts, "last", "last-ema", "best")
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
