"""benchmarks/native.py at toy sizes: it resumes, and its page is that of its lines."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.full
def test_it_resumes_and_writes_its_page(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("native")
    only = ["--only", "block", "buckets", "tokens"]
    given = ["native.py", "--quick", "--rounds", "1", *only, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", given)
    threads = torch.get_num_threads()
    script.main()
    kept = (tmp_path / "native.jsonl").read_text()
    script.main()
    torch.set_num_threads(threads)
    assert (tmp_path / "native.jsonl").read_text() == kept
    rows = script.read(tmp_path / "native.jsonl")
    assert [(row["what"], row["kind"]) for row in rows] == [
        (what, kind) for what in only[1:] for kind in ("forward", "training")
    ]
    assert all(row["fused"]["ratio"]["median"] > 0 for row in rows)
    page = (tmp_path / "native.md").read_text()
    assert page == script.page(rows) and page.count("\n| ") == 2 + len(rows)
