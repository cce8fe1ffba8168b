"""data.workers: null uses the available cores."""

import os

import pytest

from training.distributed import loader_workers

LOCAL = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE")


@pytest.mark.parametrize(
    ("cores", "environment", "options", "workers"),
    [
        (2, {}, {}, 2),
        (6, {}, {}, 6),
        (64, {}, {}, 8),
        (16, {"LOCAL_WORLD_SIZE": "4"}, {}, 4),
        (16, {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, {}, 2),
        (128, {"LOCAL_WORLD_SIZE": "8"}, {}, 8),
        (2, {"LOCAL_WORLD_SIZE": "4"}, {}, 0),
        (16, {}, {"digits": True}, 0),
        (2, {}, {"streams": True}, 4),
        (2, {}, {"given": 11, "digits": True}, 11),
        (2, {}, {"given": 0, "streams": True}, 0),
    ],
)
def test_workers(cores, environment, options, workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    for name in LOCAL:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert loader_workers(**{"given": None, "digits": False, **options}) == workers


@pytest.mark.parametrize("script", ["train_cls", "train_det"])
def test_the_help_says_so(script, capsys):
    import importlib

    with pytest.raises(SystemExit):
        importlib.import_module(script).main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "divided by its processes, at most 8" in told


@pytest.mark.cases(1)
@pytest.mark.parametrize("arguments", [["--data.workers=null"], ["--data.workers=1"]])
def test_a_run_asks_for_them(arguments, cls, monkeypatch):
    asked = []
    from training import task

    monkeypatch.setattr(
        task, "loader_workers", lambda *given, **named: asked.append((given, named)) or 0
    )
    assert cls(*arguments, "--epochs=1")[0] == 0
    given = None if arguments == ["--data.workers=null"] else 1
    assert asked == [((given,), {"digits": True, "streams": False})] * 2


def test_a_negative_number(cls):
    status, _, err = cls("--data.workers=-1")
    assert status == 2 and "data.workers: -1 is negative" in err
