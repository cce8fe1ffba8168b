"""Checkpoints of others: read safely, or refused with the reason; and written in both formats."""

import argparse
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from irpe import IrpeError
from irpe.files.read import Checkpoint, read_checkpoint, read_weights, write_checkpoint


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)).state_dict()


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
    held = read_weights(tmp_path / "a.pth")
    assert held.keys() == state.keys()
    assert all(torch.equal(held[key], state[key]) for key in state)


def test_old_torch_format(state, tmp_path: Path):
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert all(torch.equal(read_weights(tmp_path / "a.pth")[key], state[key]) for key in state)


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
    with pytest.raises(IrpeError, match=r"refused: it builds '\w+\.mkdir'"):
        read_weights(tmp_path / "a.pth")
    assert not (tmp_path / "witness").exists()
    # The test can fail: an unsafe load of the same file does make it.
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert (tmp_path / "witness").exists()


def test_a_namespace_may_not_smuggle(state, tmp_path: Path):
    args = argparse.Namespace(inner=Malicious(tmp_path / "witness"))
    torch.save({"model": state, "args": args}, tmp_path / "a.pth")
    with pytest.raises(IrpeError, match="refused"):
        read_weights(tmp_path / "a.pth")
    assert not (tmp_path / "witness").exists()


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
    with pytest.raises(IrpeError) as caught:
        read_weights(path)
    assert str(path) in str(caught.value)
    assert "truncated" in str(caught.value)
    assert "\n" not in str(caught.value)


NO_WEIGHTS = {
    "list": ([1, 2], "list"),
    "numbers": ({"epoch": 3}, "epoch"),
    "empty": ({}, "has no weights"),
    "nested numbers": ({"model": {"a": 1}}, "has no weights"),
}


@pytest.mark.parametrize(("content", "part"), NO_WEIGHTS.values(), ids=NO_WEIGHTS.keys())
def test_files_without_weights(content, part: str, tmp_path: Path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(IrpeError, match="has no weights") as caught:
        read_weights(tmp_path / "a.pth")
    assert part in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path):
    for path, says in ((tmp_path / "none.pth", "is not a file"), (tmp_path, "has none of model")):
        with pytest.raises(IrpeError, match=says):
            read_weights(path)


ABOUT = {
    "a namespace": {"args": argparse.Namespace(enc_rpe2d="rpe-2.0-product-ctx-1-k", lr=1e-4)},
    "a dict": {"args": {"enc_rpe2d": "rpe-2.0-product-ctx-1-k", "lr": 1e-4, "steps": [1, 2]}},
}


@pytest.mark.parametrize("args", ABOUT.values(), ids=ABOUT.keys())
def test_what_stands_beside_the_weights(args, state, tmp_path: Path):
    torch.save({"model": state, **args}, tmp_path / "a.pth")
    held = read_checkpoint(tmp_path / "a.pth")
    assert held.about == {"enc_rpe2d": "rpe-2.0-product-ctx-1-k", "lr": "0.0001"}
    assert held.spec == "rpe-2.0-product-ctx-1-k"
    assert Checkpoint(state, {"rpe": "none"}).spec is None


@pytest.mark.parametrize("names", [("b.safetensors", "c.pth"), ("b.pt", "c.safetensors")])
def test_written_and_read_again(names, tmp_path: Path):
    shared = torch.randn(4, 3)
    state = {"a": shared, "b": shared, "t": torch.randn(3, 2).T, "n": torch.tensor(3)}
    state["half"] = torch.randn(2).bfloat16()
    held = Checkpoint(state, {"rpe": "rpe-1.9-product-ctx-1-k"})
    for name in names:
        write_checkpoint(tmp_path / name, held)
        held = read_checkpoint(tmp_path / name)
        assert held.about == {"rpe": "rpe-1.9-product-ctx-1-k"}
        assert sorted(held.weights) == sorted(state)
        for key, value in state.items():
            assert held.weights[key].dtype == value.dtype
            assert torch.equal(held.weights[key], value)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)


def test_no_other_ending_is_written(state, tmp_path: Path):
    with pytest.raises(IrpeError, match=r"ends in \.safetensors"):
        write_checkpoint(tmp_path / "a.npz", Checkpoint(state, {}))


def test_a_few_bytes_that_ask_for_much_memory(tmp_path: Path):
    bomb = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x01\x85R."  # bytearray(2 ** 32)
    old = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {}))
    (tmp_path / "a.pth").write_bytes(old + bomb + pickle.dumps([], 2))
    with pytest.raises(IrpeError, match="refused: it builds 'builtins.bytearray'"):
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
    with pytest.raises(IrpeError, match="not written by torch"):
        read_weights(tmp_path / "b.pth")
    content = bytearray((tmp_path / "a.pth").read_bytes())
    content[place] ^= 1
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(IrpeError, match="'a/data/0' in it does not have its checksum"):
        read_weights(tmp_path / "a.pth")
