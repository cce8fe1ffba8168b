"""What several tests name: where the official numbers are, and ways to run a backend."""

from pathlib import Path

import pytest

FIXTURES = Path(__file__).parent / "fixtures"

# A backend for tests: eager, by tiles as it would go over larger inputs.
TILES = tuple(
    pytest.param("eager", id=name, marks=pytest.mark.tiles(size))
    for name, size in (("tiles", 10**6), ("small tiles", 50))
)


def refuses(call, *parts, error=None):
    """The call raises an error, irpe's if none is named, whose message has each of the parts."""
    if error is None:  # irpe reads the environment that conftest.py sets
        from irpe import IrpeError as error
    with pytest.raises(error) as caught:
        call()
    missing = [part for part in parts if part not in str(caught.value)]
    assert caught.type is error and not missing, (missing, str(caught.value))
