"""run.trackers: the records of a run go to experiment trackers too."""

import json
from pathlib import Path

import accelerate.tracking
import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType


class Lines(GeneralTracker):
    """Writes what it gets as lines of JSON; in the place of a tracker whose package is absent."""

    name = "tensorboard"
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: str) -> None:
        super().__init__()
        self.path = Path(logging_dir) / "tracked.jsonl"

    @property
    def tracker(self):
        return self.path

    def _write(self, **content) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(content) + "\n")

    def store_init_configuration(self, values):
        self._write(config=values)

    def log(self, values, step=None, **kwargs):
        self._write(step=step, values=values)

    def finish(self):
        self._write(finished=True)


@pytest.fixture
def lines(monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Lines)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.TENSORBOARD])


def test_each_record_is_logged(cls, lines, tmp_path: Path):
    options = ["--run.trackers=[tensorboard]", "--run.experiment=x"]
    assert cls(*options)[0] == 0
    folder = tmp_path / "runs" / "x"
    config, *logged, end = map(json.loads, (folder / "tracked.jsonl").read_text().splitlines())
    assert config["config"]["optim.lr"] == 0.003 and end == {"finished": True}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["values"] for line in logged] == records and len(records) == 2
    assert [line["step"] for line in logged] == [record["step"] for record in records]
    # It may be left out when the run is resumed.
    assert cls("--epochs=3", f"--resume={folder}", "--run.experiment=x")[0] == 0
    assert len((folder / "tracked.jsonl").read_text().splitlines()) == 4


def test_a_run_that_fails_finishes_its_trackers(cls, lines, tmp_path: Path):
    assert cls("--run.trackers=[tensorboard]", "--optim.lr=1e30", "--run.experiment=x")[0] == 2
    last = (tmp_path / "runs/x/tracked.jsonl").read_text().splitlines()[-1]
    assert json.loads(last) == {"finished": True}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("[tensorboard]", "'tensorboard' needs the package tensorboard; pip install tensorboard"),
        ("[wandb]", "'wandb' needs the package wandb"),
        ("[tensorbord]", "'tensorbord' is unknown; valid: aim"),
    ],
)
def test_missing_packages(cls, names, message, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    status, _, err = cls(f"--run.trackers={names}")
    assert status == 2 and err.count("\n") == 1
    assert "run.trackers: " + message in err
    assert not (tmp_path / "runs").exists()
