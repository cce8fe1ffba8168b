"""benchmarks/text.py: a few runs at toy sizes, resuming, and a page from invented lines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}


def run(*arguments):
    command = [sys.executable, "benchmarks/text.py", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=False, env=ENVIRONMENT
    )


@pytest.fixture
def page(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import text_report

    return text_report


@pytest.mark.full
def test_runs_leave_lines_and_are_not_run_twice(tmp_path):
    given = ["--quick", "--seeds", "0", "--threads", "1", "--out", tmp_path, "--only", "staged"]
    done = run(*given)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(text) for text in (tmp_path / "text.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["long", "staged", "short"]
    for line in lines:
        assert [score["protocol"] for score in line["scores"]] == [
            "non-overlapping, window 2048", "sliding window, stride 512, window 2048"
        ]  # fmt: skip
        cpu = [point["train_cpu_seconds"] for point in line["curve"]]
        assert len(cpu) == 2 and 0 < cpu[0] < cpu[1]
    text = (tmp_path / "text.md").read_text()
    assert "Toy sizes" in text and "| staged |" in text and "seed 0:" in text
    assert (tmp_path / "text_staged.png").stat().st_size > 10_000
    # A lost line is written again from its run's folder; the other runs do not run.
    kept = [line for line in lines if line["name"] != "short"]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    done = run(*given)
    assert done.returncode == 0, done.stderr
    assert [text for text in done.stdout.splitlines() if text.startswith("done:")] == [
        "done: staged short seed 0"
    ]
    again = [json.loads(text) for text in (tmp_path / "text.jsonl").read_text().splitlines()]
    assert again[-1]["scores"] == lines[-1]["scores"] and again[-1]["curve"] == lines[-1]["curve"]


@pytest.mark.slow
def test_all_experiments(tmp_path):
    done = run("--quick", "--seeds", "0", "1", "--threads", "1", "--out", tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    text = (tmp_path / "text.md").read_text()
    for part in ("Longer than in training", "Staged", "Position-infused", "over PIA", "Segments"):
        assert part in text
    for part in (
        "| learned interpolated |",
        "| rope chunk |",
        "| sliding 512 | 1 |",
        "| rope twice |",
    ):
        assert part in text


@pytest.mark.full
def test_toy_results_do_not_reach_the_repository():
    done = run("--quick")
    assert done.returncode == 2
    assert "--quick needs --out" in done.stderr


def line(experiment, name, seed, bits, **more):
    scores = [{"protocol": protocol, "bits_per_byte": value} for protocol, value in bits.items()]
    machine = {"processor": "one of two", "threads": 2}
    return {
        "experiment": experiment, "name": name, "seed": seed, "scores": scores, "quick": False,
        "machine": machine, **more,
    }  # fmt: skip


def test_groups(page):
    values = {"a": [2.0, 2.1], "b": [2.2, 2.25], "c": [2.9, 2.95], "d": [3.0, 3.0]}
    assert page.groups(values) == [["a", "b"], ["c", "d"]]
    assert page.groups({"a": [1.0], "b": [2.0]}) == [["a"], ["b"]]
    unsure = {"a": [1.0, 1.1], "b": [2.0, 2.1], "c": [2.5, 2.9]}
    assert page.groups(unsure) == [["a"], ["b", "c"]]
    assert page.groups({**unsure, "c": [2.0, 5.0]}) == [["a", "b", "c"]]  # a may be like c


def test_share_of_the_baseline(page):
    baseline = [{"bits_per_byte": b, "train_cpu_seconds": t} for b, t in ((3, 10), (2.5, 20))]
    curve = [{"bits_per_byte": b, "train_cpu_seconds": t} for b, t in ((3, 4), (2.6, 8), (2.4, 12))]
    assert page.reached(curve, baseline) == 12 / 20
    assert page.reached(curve[:2], baseline) is None


def test_a_page_of_lines(page, tmp_path):
    own = ["non-overlapping, window 128", "non-overlapping, window 512"]
    lines = [
        line("lengths", name, seed, dict(zip(own, (first + seed / 100, last), strict=True)))
        for name, first, last in (("rope", 2.0, 3.0), ("shaw", 2.1, 2.2))
        for seed in (0, 1)
    ]
    bits = {"plain": 3.0, "chunk": 2.6, "twice": 2.5}
    lines += [line("segments", f"rope {kind}", 0, {own[1]: value}) for kind, value in bits.items()]
    lines += [
        line("segments", "learned base", 0, {own[0]: 2.0}),
        line("segments", "learned interpolated", 0, {own[1]: 2.2}),
    ]
    for window, value in ((128, 2.3), (256, 2.2)):
        curve = [{"train_cpu_seconds": 60.0}]
        score = {f"token by token, window {window}": value}
        lines.append(line("shortformer", f"sliding {window}", 0, score, curve=curve))
    for name, mib in (("rope plain", 100.0), ("rope chunk", 104.0)):
        lines.append(line("memory", name, 0, {}, mib=mib))
    text = page.report(lines, tmp_path, "a command").read_text()
    assert "at its own length (goal: 15 % worse at most), for each seed: +10.0%." in text
    assert "Best of the sliding windows, token by token: sliding 256." in text
    assert "| sliding 128 | token by token, window 128 | 2.300 | 60 |" in text
    assert "| rope chunk | 104 | 1.040 |" in text
    assert "`a command` writes this page" in text and "Toy" not in text
    assert "| rope | 2.005 (2.000 to 2.010) | 3.000 (3.000 to 3.000) |" in text
    assert f"- {own[0]}: {{rope}} < {{shaw}}" in text
    assert f"- {own[1]}: {{shaw}} < {{rope}}" in text
    assert "- rope, non-overlapping, window 512: +0.400 against +0.500 (80%)" in text
    assert "Machine: processor one of two, threads 2." in text
    assert (tmp_path / "text_lengths.png").exists()
