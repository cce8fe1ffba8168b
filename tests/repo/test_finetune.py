"""benchmarks/finetune.py at toy sizes, and how it sums up."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("finetune")


@pytest.mark.full
def test_the_page_is_that_of_the_runs(tmp_path):
    page = tmp_path / "pages" / "finetune.md"
    command = [sys.executable, str(ROOT / "benchmarks/finetune.py"), "--seeds=3", "--epochs=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--more=1", f"--page={page}", f"--name={tmp_path / 'figures'}"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert text in done.stdout
    runs = [
        [float(x) for x in re.findall(r"([\d.]+) % ", line)]
        for line in done.stdout.splitlines()[:3]
    ]
    rows = [line for line in text.splitlines() if re.match(r"\| (as|fine)", line)]
    for column, row in enumerate(rows):
        mean = sum(run[column] for run in runs) / 3
        assert float(re.findall(r"[\d.]+", row)[0]) == pytest.approx(mean, abs=0.02)
    assert len(rows) == 3 and len(set(rows)) == 3
    difference = sum(run[2] - run[1] for run in runs) / 3
    found = re.search(r"accuracy, points: ([+-][\d.]+) ± [\d.]+, (a tie|\w+ with tables)", text)
    assert float(found[1]) == pytest.approx(difference, abs=0.02)


def test_verdicts(script):
    assert script.spread([1.0, 2.0, 3.0], ".2f") == ("2.00 ± 2.48", True)  # 4.303 / sqrt(3)
    assert script.spread([1.0, 1.1, 1.2], "+.1f") == ("+1.1 ± 0.2", False)

    given = {"seeds": 3, "epochs": 1, "more": 1}
    facts = {"processor": "a processor", "threads": 1, "torch": "2", "date": "a day"}

    def runs(gain, loss):
        names = ("as trained", "fine-tuned without tables", "fine-tuned with tables")
        base = [(90.0 + n, 0.5 - n / 100) for n in range(3)]
        return [
            dict(zip(names, (b, b, (b[0] + gain + n / 100, b[1] + loss + n / 1000)), strict=True))
            for n, b in enumerate(base)
        ]

    better = script.page(runs(1.0, -0.1), given, facts)
    assert better.count("better with tables") == 2
    worse = script.page(runs(-1.0, 0.1), given, facts)
    assert worse.count("worse with tables") == 2
    assert script.page(runs(-0.01, -0.001), given, facts).count("a tie") == 3  # once explained
