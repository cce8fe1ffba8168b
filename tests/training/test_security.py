"""A checkpoint, a state or a configuration from a stranger cannot run code: it is really tried."""

import hashlib
import os
import pickle
from pathlib import Path

import pytest
import torch

from training.checkpoint import States


class Malicious:
    """Unpickled without care, it makes a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


@pytest.fixture
def witness(tmp_path: Path):
    """A path that the attacks would make; they are real, as the last line proves."""
    path = tmp_path / "witness"
    yield path
    assert not path.exists()
    pickle.loads(pickle.dumps(Malicious(path)))
    assert path.exists()


def state_with(content: object, folder: Path) -> Path:
    """Put a state into a folder whose name and checksum are right."""
    path = folder / "state-epoch9-step99.pt"
    torch.save(content, path)
    sum_ = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return path.rename(folder / f"state-epoch9-step99-{sum_}.pt")


@pytest.mark.parametrize("form", ["zip", "plain pickle", "named safetensors"])
@pytest.mark.parametrize("where", ["checkpoint", "wrapped"])
def test_checkpoints(form, where, lm, witness, tmp_path: Path):
    content = Malicious(witness) if where == "checkpoint" else {"model": {"a": Malicious(witness)}}
    path = tmp_path / ("a.safetensors" if form == "named safetensors" else "a.pth")
    if form == "zip":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    for more in (["--eval-only"], []):
        status, _, err = lm(*more, f"--checkpoint={path}")
        assert status == 2 and err.count("\n") == 1
        assert str(path) in err and "weights_only" not in err


def test_states(lm, witness, tmp_path: Path):
    """Not even one with a right checksum; the state before it is used."""
    assert lm("--run.experiment=x")[0] == 0
    folder = tmp_path / "runs" / "x"
    (folder / "progress.json").unlink()
    bad = state_with({"epoch": 9, "model": Malicious(witness)}, folder / "checkpoints")
    assert States(folder / "checkpoints").paths()[0] == bad
    status, _, err = lm("--run.experiment=x", f"--resume={folder}")
    assert status == 0
    assert err.count("\n") == 1 and f"warning: resume: {str(bad)!r} refused" in err
    assert "mkdir" in err and "weights_only" not in err


TAGS = [
    "!!python/object/apply:os.mkdir ['{}']",
    "!!python/object/new:os.mkdir ['{}']",
    "!!python/name:os.mkdir",
    "{{class_path: os.mkdir, init_args: {{path: '{}'}}}}",
    "{{class_path: subprocess.Popen, init_args: {{args: [mkdir, '{}']}}}}",
    "{{a: {{class_path: subprocess.Popen, init_args: {{args: [mkdir, '{}']}}}}}}",
    "{{a: !!python/object/apply:os.mkdir ['{}']}}",
]
KEYS = ["seed", "encoding", "model", "optim.kwargs", "checkpoint", "run", "stages"]


@pytest.mark.parametrize("form", TAGS)
@pytest.mark.parametrize("key", KEYS)
def test_configurations(form, key, lm, witness, tmp_path: Path):
    """As a file, as an option, and as a file that an option names."""
    value = form.format(witness)
    nested = "".join(f"{part}: {{" for part in key.split(".")[:-1])
    text = f"{nested}{key.split('.')[-1]}: {value}{'}' * nested.count('{')}\n"
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "b.yaml").write_text(value + "\n")
    for arguments in (
        [f"--config={tmp_path / 'a.yaml'}"],
        [f"--{key}={value}"],
        [f"--{key}={tmp_path / 'b.yaml'}"],
    ):
        status, _, err = lm("--epochs=1", *arguments)
        assert status == 2 and err.count("\n") == 1, arguments


def test_the_config_of_a_run(lm, witness, tmp_path: Path):
    assert lm("--run.experiment=x")[0] == 0
    folder = tmp_path / "runs" / "x"
    (folder / "progress.json").unlink()
    (folder / "config.yaml").write_text(f"seed: !!python/object/apply:os.mkdir ['{witness}']\n")
    status, _, err = lm("--run.experiment=x", "--resume=auto")
    assert status == 2 and "cannot read" in err and "config.yaml" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model.pretrained", "--model.kwargs={{pretrained_cfg_overlay: {{file: '{}'}}}}"],
        ["--model.kwargs={{checkpoint_path: '{}'}}"],
        ["--model.pretrained", "--model.name=local-dir:{}"],
    ],
)
def test_weights_by_way_of_timm(arguments, cls, witness, tmp_path: Path):
    path = tmp_path / "evil.pth"
    torch.save({"state_dict": Malicious(witness)}, path)
    status, _, err = cls(*[argument.format(path) for argument in arguments])
    assert status == 2 and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--data.name=hfds/a", "--data.kwargs={trust_remote_code: true}"], "trust_remote_code"),
        (["--data.name=wds/a", "--data.root=pipe:mkdir WITNESS"], "could run a command"),
        (["--data.name=wds/a", "--data.root=s3://a';mkdir WITNESS;'"], "could run a command"),
        (
            ["--data.name=wds/a", "--data.root=.", "--data.train_split=pipe:mkdir WITNESS.tar"],
            "could run a command",
        ),
    ],
)
def test_data_sets(arguments, part, cls, witness):
    status, _, err = cls(*[argument.replace("WITNESS", str(witness)) for argument in arguments])
    assert status == 2 and err.count("\n") == 1
    assert part in err
