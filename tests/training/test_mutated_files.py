"""Files that were damaged at random: each is refused in one line, or loads whole."""

import hashlib
import random
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from irpe import IrpeError
from training.checkpoint import States, read_state
from training.errors import UserError
from training.weights import start_from

SAMPLE = 100  # of each form
FORMS = ["pth", "safetensors", "state", "state with its checksum made right"]


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Truncate a file, overwrite a few bytes, or double, remove or zero a range."""
    data, kind = bytearray(content), draw.randrange(5)
    # Half of them near the ends, where formats keep what they are.
    near = draw.random() < 0.5
    at = draw.randrange(min(200, len(data))) if near else draw.randrange(len(data))
    at = len(data) - 1 - at if draw.random() < 0.5 else at
    length = draw.randrange(1, 64)
    if kind == 0:
        del data[at:]
    elif kind == 1:
        for _ in range(draw.randrange(1, 8)):
            data[max(0, min(len(data) - 1, at + draw.randrange(-40, 40)))] = draw.randrange(256)
    elif kind == 2:
        data[at:at] = data[at : at + length]
    elif kind == 3:
        del data[at : at + length]
    else:
        data[at : at + length] = bytes(min(length, len(data) - at))
    return bytes(data)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))


def check(form: str, number: int, folder: Path) -> int:
    """Return how many of so many damaged files were refused."""
    model = network()
    if form == "safetensors":
        original = safetensors.torch.save(model.state_dict())
    else:
        path = folder / "whole.pth"
        torch.save({"model": model.state_dict(), "epoch": 1, "step": 2}, path)
        original = path.read_bytes()
    draw, refused = random.Random(form), 0
    right = hashlib.sha256(original).hexdigest()[:16]
    for _ in range(number):
        content = mutated(original, draw)
        if content == original:
            continue
        digest = hashlib.sha256(content).hexdigest()[:16] if "made right" in form else right
        name = f"state-epoch1-step2-{digest}.pt" if "state" in form else f"a.{form}"
        path = folder / name
        path.write_bytes(content)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        try:
            if "state" in form:
                assert isinstance(read_state(path), dict)
            else:
                start_from(model, str(path), {}, training=False)
                model = network()  # some were loaded whose numbers are not numbers any more
        except (UserError, IrpeError) as error:
            refused += 1
            assert "\n" not in str(error) and name in str(error)
            after = model.state_dict()
            assert all(torch.equal(before[key], after[key]) for key in before)
        path.unlink()
    return refused


@pytest.mark.parametrize("form", FORMS)
def test_a_sample(form, tmp_path: Path):
    refused = check(form, SAMPLE, tmp_path)
    assert refused > SAMPLE // 3
    if form == "state":
        assert refused >= SAMPLE - 5  # but for changes that change nothing
        assert States(tmp_path).paths() == []


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_many(form, tmp_path: Path):
    check(form, 2000, tmp_path)
