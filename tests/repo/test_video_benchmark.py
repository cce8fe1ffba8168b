"""benchmarks/video.py at toy sizes: it resumes, and its page is that of its lines."""

import importlib
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("video")


def test_it_resumes_and_writes_its_page(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "SPECS", {"no encoding": None, "axial rotary": "rope-axial"})
    monkeypatch.setattr(sys, "argv", ["video.py", "--quick", "--out", str(tmp_path)])
    threads = torch.get_num_threads()
    script.main()
    kept = (tmp_path / "video.jsonl").read_text()
    lines = [json.loads(text) for text in kept.splitlines()]
    assert {(x["name"], x["seed"]) for x in lines} == {
        (name, seed) for name in script.SPECS for seed in (0, 1)
    }
    script.main()
    torch.set_num_threads(threads)
    assert (tmp_path / "video.jsonl").read_text() == kept
    page = (tmp_path / "video.md").read_text()
    assert page == script.page(lines) and "| axial rotary | `rope-axial` |" in page


def test_what_moves_where(script):
    """The class of a video is what its brightest column and row do."""
    recipe = {**script.RECIPE, "frames": 3}
    videos, classes = script.Moves("validation", 0, recipe).draw(64)
    assert set(classes.tolist()) == set(range(script.Moves.classes))
    for video, kind in zip(videos[:, 0], classes.tolist(), strict=True):
        (dy, dx), speed = script.DIRECTIONS[kind // 2], script.SPEEDS[kind % 2]
        for before, after in itertools.pairwise(video):
            moved = torch.roll(before, (dy * speed, dx * speed), (0, 1))
            torch.testing.assert_close(after, moved)


def test_what_lies_within(script):
    """Some cell is within the class's distance of all patches that hold a digit."""
    videos, classes = script.Clusters("validation", 0, script.RECIPE).draw(64)
    assert set(classes.tolist()) == set(range(script.Clusters.classes))
    cells = torch.cartesian_prod(*[torch.arange(4)] * 3).double()
    for video, kind in zip(videos[:, 0], classes.tolist(), strict=True):
        patches = video.unflatten(2, (4, 4)).unflatten(1, (4, 4)).amax((2, 4))
        held = patches.nonzero().double()
        assert len(held) == script.SCANS
        within = torch.cdist(cells, held).amax(1).min()
        assert within <= script.WITHIN[kind]
