"""Run the scripts in-process, and start each test from fresh global state."""

import argparse
import inspect
import random
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from cls_command import TINY
from lm_command import TINY as LM_TINY
from PIL import Image

from training.loop import Loop


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate keeps its settings, and torch its thread count, for the whole process."""
    threads = torch.get_num_threads()
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
    torch.set_num_threads(threads)


@pytest.fixture
def cls(tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable:
    """Return ``run(*arguments) -> (status, output, errors)`` of train_cls.py, in this process."""
    import train_cls

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = train_cls.main([*TINY, f"--run.output={tmp_path / 'runs'}", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Return a context, ``stopped(step)``, in which runs are interrupted before a step."""

    @contextmanager
    def at(number: int):
        real = Loop._one_step

        def step(self, *given):
            if self.step >= number:
                raise KeyboardInterrupt
            return real(self, *given)

        with monkeypatch.context() as patch:
            patch.setattr(Loop, "_one_step", step)
            yield

    return at


@pytest.fixture(scope="session")
def book(tmp_path_factory) -> Path:
    """A text of 20,000 bytes that every machine has."""
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(inspect.getsource(argparse)[:20_000])
    return path


@pytest.fixture
def lm(tmp_path: Path, capsys: pytest.CaptureFixture, book: Path) -> Callable:
    """Return ``run(*arguments) -> (status, output, errors)`` of train_lm.py, in this process."""
    import train_lm

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        given = [f"--data.root={book}", f"--run.output={tmp_path / 'runs'}"]
        status = train_lm.main([*LM_TINY, *given, *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of images: train/ and val/, classes ant and bee, 6 and 5 files each."""
    generator = random.Random(0)
    for split, count in (("train", 6), ("val", 5)):
        for name in ("ant", "bee"):
            directory = tmp_path / "images" / split / name
            directory.mkdir(parents=True)
            for number in range(count):
                value = generator.randrange(256)
                pixels = np.full((12, 9, 3), value, dtype=np.uint8)
                Image.fromarray(pixels).save(directory / f"{number}.png")
    return tmp_path / "images"
