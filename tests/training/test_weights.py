"""Weights are loaded whole, or refused with the reason; files are written whole."""

import argparse
import json
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from cls_command import ROOT
from torch import nn

from irpe import IrpeError
from irpe.files.read import read_weights
from models.detr import build_detr
from training.checkpoint import States, read_state, save_weights
from training.errors import UserError
from training.weights import difference, identity, start_from


def network(width: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, width), nn.Linear(width, 2))


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return {key: value + 1 for key, value in network().state_dict().items()}


@pytest.mark.parametrize("spec", [None, "rpe-2.0-product-ctx-1-k"])
def test_a_released_detr(spec, tmp_path: Path):
    """A file like those of DETR and of DETR with iRPE, by their names and shapes alone."""
    known = json.loads((ROOT / "tests" / "fixtures" / "detr_keys.json").read_text())
    shapes = known["rpe-2.0-product-ctx-1-k"]["keys"]
    if spec is None:
        shapes = {name: shape for name, shape in shapes.items() if "rpe" not in name}
        assert len(shapes) == known["none"]["n_keys"]
    assert any(name.startswith("backbone.0.body.layer4.2.bn3.") for name in shapes)
    state = {name: torch.full(shape, i / 8) for i, (name, shape) in enumerate(shapes.items())}
    args = argparse.Namespace(enc_rpe2d=spec, lr=1e-4, masks=False)
    torch.save({"model": state, "args": args, "epoch": 150}, tmp_path / "detr.pth")
    model = build_detr(enc_rpe2d=spec)
    start_from(model, str(tmp_path / "detr.pth"), {}, training=False)
    (tmp_path / "detr.pth").unlink()  # 166 MB that nobody needs
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_own_files_come_back(tmp_path: Path):
    model = network()
    model[1].weight = model[1].weight  # a parameter under one name stays one
    save_weights(tmp_path / "a.safetensors", model, {"model": "net", "epoch": 3})
    again = read_weights(tmp_path / "a.safetensors")
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "irpe": "{}", "model": "net", "epoch": "3"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path):
    states = States(tmp_path, keep=1)
    path = states.save({"epoch": 1, "step": 5})
    with pytest.raises((AttributeError, pickle.PicklingError)):
        states.save({"epoch": 2, "step": 10, "more": lambda: 2})
    assert read_state(path) == {"epoch": 1, "step": 5}
    assert list(tmp_path.iterdir()) == [path]


def test_weights_of_another_kind(state, tmp_path: Path):
    torch.save({key: value.int() for key, value in state.items()}, tmp_path / "a.pth")
    model = network()
    with pytest.raises(IrpeError, match="4 of another kind: 0.weight torch.int32 in the file"):
        start_from(model, str(tmp_path / "a.pth"), {}, training=False)
    torch.save({key: value.half() for key, value in state.items()}, tmp_path / "a.pth")
    start_from(model, str(tmp_path / "a.pth"), {}, training=False)  # another precision is fine
    assert torch.equal(model.state_dict()["0.bias"], state["0.bias"].half().float())


def test_another_architecture_is_listed_and_nothing_is_loaded(state, tmp_path: Path):
    model = network(width=4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state["2.weight"] = torch.zeros(1)
    del state["0.bias"]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(IrpeError) as caught:
        start_from(model, str(tmp_path / "a.pth"), {}, training=False)
    for part in (
        "1 missing in the file: 0.bias",
        "1 unknown to the model: 2.weight",
        "2 of another shape: 0.weight [3, 2] in the file, [4, 2] in the model",
    ):
        assert part in str(caught.value)
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)


CLASSES = [
    # before, now, what the message must contain; None: no difference
    (["ant", "bee"], ["ant", "bee"], None),
    (["ant", "bee"], None, None),
    (["ant", "bee"], ["bee", "ant"], ["0: 'ant' before, 'bee' now"]),
    (["ant", "bee"], ["ant", "bee", "cow"], ["2: 'absent' before, 'cow' now", "only now: cow"]),
    (["apple", "bee"], ["zebra", "bee"], ["only before: apple", "only now: zebra"]),
    (
        {1: "ant", 3: "bee"},
        {1: "ant", 4: "bee"},
        ["3: 'bee' before, 'absent' now", "4: 'absent' before"],
    ),
    ({1: "ant", 3: "bee"}, {1: "ant", 3: "bee"}, None),
    (["ant"] * 50, ["bee"] * 50, ["46 more"]),
]


@pytest.mark.parametrize(("before", "now", "parts"), CLASSES)
def test_classes_are_compared(before, now, parts, tmp_path: Path):
    """Evaluation raises; training keeps a fresh classifier and loads the rest."""
    saved = network()
    save_weights(tmp_path / "a.safetensors", saved, identity(before))
    file, own = str(tmp_path / "a.safetensors"), identity(now)
    model = network()
    nn.init.ones_(model[0].weight)
    nn.init.ones_(model[1].weight)
    loaded = start_from(model, file, own, [model[1]], training=True)
    assert torch.equal(model[0].weight, saved[0].weight)
    assert torch.equal(model[1].weight, saved[1].weight) == (parts is None)
    if parts is None:
        assert difference(identity(before), own) is None and "fresh" not in loaded
        start_from(model, file, own, training=False)
        return
    with pytest.raises(UserError, match="was trained on other classes") as caught:
        start_from(model, file, own, training=False)
    for part in parts:
        assert part in str(caught.value) and part in loaded
