"""A fast sample of benchmarks/soak.py: nothing that rounds of training made is alive after them."""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import pytest
import soak
import torch
from accelerate.state import AcceleratorState

import irpe
from irpe.cache import CACHE


@pytest.mark.full
def test_rounds_leave_nothing_alive(tmp_path):
    AcceleratorState._reset_state(True)
    record = soak.soak(0, tmp_path, rounds=3)
    AcceleratorState._reset_state(True)
    assert record.steps == [13, 26, 39]
    # The first round fills what is kept for good, such as the cache of bucket functions.
    assert record.tensors[1] == record.tensors[2], record.tensors
    assert record.geometries[1] == record.geometries[2], record.geometries
    assert len(record.resident) == len(record.handed_out) == 3
    assert not list(tmp_path.iterdir())


def test_memory_handed_out():
    before = soak.handed_out()
    if math.isnan(before):
        pytest.skip("needs the GNU C library")
    kept = torch.empty(2**25, dtype=torch.uint8)
    assert 31 < soak.handed_out() - before < 33
    del kept
    assert abs(soak.handed_out() - before) < 1


@pytest.mark.full
def test_bucket_ids_are_bounded_over_many_grids(monkeypatch):
    # Other tests' grids may be alive too.
    before = len(soak.alive(irpe.Geometry))
    monkeypatch.setattr(CACHE, "limit", 2**23)
    irpe.clear_cache()
    geometries, held = soak.many_grids(75, most=20)
    assert len(geometries) == 3
    assert max(geometries) - before < 20, (before, geometries)
    assert 2**22 < max(held) <= 2**23, held  # those of one grid of 20x20 are 1.3 MB


def test_slope():
    x = [0, 1000, 2000, 3000]
    assert soak.slope(x, [5.0, 7.0, 9.0, 11.0]) == (2.0, 0.0)
    rise, half = soak.slope(x, [5.0, 7.1, 8.9, 11.0])
    assert abs(rise - 1.98) < 1e-9 and 0 < half < 0.2
    own = soak.growth(x, [5.0, 7.1, 8.9, 11.0])
    assert (own["from"], own["to"], own["rise"]) == (5.0, 11.0, rise)
    assert own["low"] == rise - half and own["high"] == rise + half
