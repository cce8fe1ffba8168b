"""Shared by all tests: two threads, fixed seeds, paths of the official numbers."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pathlib import Path

import pytest
import torch

FIXTURES = Path(__file__).parent / "fixtures"
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def fixtures() -> Path:
    """Folder with the numbers of the official code."""
    return FIXTURES
