"""What several tests name: where the official numbers are, and ways to run a backend."""

from pathlib import Path

import pytest

FIXTURES = Path(__file__).parent / "fixtures"

# A backend for tests: eager, by tiles as it would go over larger inputs.
TILES = tuple(
    pytest.param("eager", id=name, marks=pytest.mark.tiles(size))
    for name, size in (("tiles", 10**6), ("small tiles", 50))
)
