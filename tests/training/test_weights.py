"""Checkpoints of others: read safely, loaded whole, or refused with the reason."""

import argparse
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from cls_command import ROOT
from torch import nn

from models.detr import build_detr
from training.checkpoints import States, read_state, save_weights
from training.errors import UserError
from training.weights import apply_weights, read_weights


def network(width: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, width), nn.Linear(width, 2))


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return {key: value + 1 for key, value in network().state_dict().items()}


WRAPPED = {
    "plain": lambda state: state,
    "under model": lambda state: {"model": state},
    "under state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "released": lambda state: {"model": state, "args": argparse.Namespace(lr=1e-3, name="deit")},
    "parallel": lambda state: {"model": {f"module.{key}": state[key] for key in state}},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_torch_files(wrap, state, tmp_path: Path):
    torch.save(wrap(state), tmp_path / "a.pth")
    model = network()
    apply_weights(model, read_weights(tmp_path / "a.pth"), "a.pth")
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)


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
    apply_weights(model, read_weights(tmp_path / "detr.pth"), "detr.pth")
    (tmp_path / "detr.pth").unlink()  # 166 MB that nobody needs
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_old_torch_format(state, tmp_path: Path):
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert all(torch.equal(read_weights(tmp_path / "a.pth")[key], state[key]) for key in state)


def test_own_files_come_back(tmp_path: Path):
    model = network()
    model[1].weight = model[1].weight  # a parameter under one name stays one
    save_weights(tmp_path / "a.safetensors", model, {"model": "net", "epoch": 3})
    again = read_weights(tmp_path / "a.safetensors")
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"model": "net", "epoch": "3"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path):
    states = States(tmp_path, keep=1)
    path = states.save({"epoch": 1, "step": 5})
    with pytest.raises((AttributeError, pickle.PicklingError)):
        states.save({"epoch": 2, "step": 10, "more": lambda: 2})
    assert read_state(path) == {"epoch": 1, "step": 5}
    assert list(tmp_path.iterdir()) == [path]


class Malicious:
    """Unpickled without care, it would make a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return (os.mkdir, (str(self.witness),))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("beside", [True, False], ids=["beside weights", "alone"])
def test_malicious_pickle_is_refused_and_does_not_run(beside, zipped, state, tmp_path: Path):
    content = Malicious(tmp_path / "witness")
    content = {"model": state, "args": content} if beside else content
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"refused: it wants to build '\w+\.mkdir'"):
        read_weights(tmp_path / "a.pth")
    assert not (tmp_path / "witness").exists()
    # The test can fail: an unsafe load of the same file does make it.
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert (tmp_path / "witness").exists()


def test_a_namespace_may_not_smuggle(state, tmp_path: Path):
    args = argparse.Namespace(inner=Malicious(tmp_path / "witness"))
    torch.save({"model": state, "args": args}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="refused"):
        read_weights(tmp_path / "a.pth")
    assert not (tmp_path / "witness").exists()


def test_a_few_bytes_that_ask_for_much_memory(tmp_path: Path):
    bomb = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x01\x85R."  # bytearray(2 ** 32)
    old = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {}))
    (tmp_path / "a.pth").write_bytes(old + bomb + pickle.dumps([], 2))
    with pytest.raises(UserError, match="refused: it wants to build 'builtins.bytearray'"):
        read_weights(tmp_path / "a.pth")


def test_an_archive_that_unpacks_or_lost_its_checksum(state, tmp_path: Path):
    torch.save(state, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as old,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
        place = old.getinfo("a/data/0").header_offset + 64  # torch aligns what it stores to 64
    with pytest.raises(UserError, match="not written by torch"):
        read_weights(tmp_path / "b.pth")
    content = bytearray((tmp_path / "a.pth").read_bytes())
    content[place] ^= 1
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match="'a/data/0' in it does not have its checksum"):
        read_weights(tmp_path / "a.pth")


def test_weights_of_another_kind(state, tmp_path: Path):
    torch.save({key: value.int() for key, value in state.items()}, tmp_path / "a.pth")
    model = network()
    with pytest.raises(UserError, match="4 of another kind: 0.weight torch.int32 in the file"):
        apply_weights(model, read_weights(tmp_path / "a.pth"), "a.pth")
    halves = {key: value.half() for key, value in state.items()}
    apply_weights(model, halves, "a.pth")  # another precision is fine
    assert torch.equal(model.state_dict()["0.bias"], state["0.bias"].half().float())


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files(suffix: str, share: float, state, tmp_path: Path):
    path = tmp_path / f"a{suffix}"
    if suffix == ".pth":
        torch.save({"model": state}, path)
    else:
        safetensors.torch.save_file(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError) as caught:
        read_weights(path)
    assert str(path) in str(caught.value)
    assert "truncated" in str(caught.value)
    assert "\n" not in str(caught.value)


NO_WEIGHTS = {
    "list": ([1, 2], "list"),
    "numbers": ({"epoch": 3}, "epoch"),
    "empty": ({}, "holds no weights"),
    "nested numbers": ({"model": {"a": 1}}, "holds no weights"),
}


@pytest.mark.parametrize(("content", "part"), NO_WEIGHTS.values(), ids=NO_WEIGHTS.keys())
def test_files_without_weights(content, part: str, tmp_path: Path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match="holds no weights") as caught:
        read_weights(tmp_path / "a.pth")
    assert part in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(UserError, match="is not a file"):
            read_weights(path)


def test_another_architecture_is_listed_and_nothing_is_loaded(state, tmp_path: Path):
    model = network(width=4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state["2.weight"] = torch.zeros(1)
    del state["0.bias"]
    with pytest.raises(UserError) as caught:
        apply_weights(model, state, "a.pth")
    for part in (
        "1 missing in the file: 0.bias",
        "1 unknown to the model: 2.weight",
        "2 of another shape: 0.weight [3, 2] in the file, [4, 2] in the model",
    ):
        assert part in str(caught.value)
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)


def test_long_lists_are_cut():
    given = {f"layer.{number}": torch.zeros(1) for number in range(50)}
    with pytest.raises(UserError, match=r"50 unknown to the model: .*layer\.5 and 44 more"):
        apply_weights(network(), given, "a.pth")
