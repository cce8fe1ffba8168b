"""The command line: what is accepted, and one line for what is not."""

from dataclasses import asdict
from pathlib import Path

import pytest

from training import config
from training.cls.options import ClsConfig
from training.errors import UserError


def parse(*arguments: str) -> ClsConfig:
    return config.parse(ClsConfig, arguments, "train_cls.py")


def test_yaml_then_command_line(tmp_path: Path):
    file = tmp_path / "a.yaml"
    file.write_text("epochs: 7\noptim: {lr: 5e-4}\nmodel: {name: a, kwargs: {depth: 3}}\n")
    got = parse("--config", str(file), "--model.name", "b", "--model.kwargs.depth=4", "--eval-only")
    assert (got.epochs, got.optim.lr, got.model.name) == (7, 5e-4, "b")
    assert got.model.kwargs == {"depth": 4}
    assert got.eval_only is True
    assert parse("--config", str(file), "--epochs", "9").epochs == 9


def test_flags_may_stand_alone_or_take_a_value():
    assert parse("--eval-only", "--epochs", "2").eval_only
    assert parse("--eval_only", "false").eval_only is False


def test_resolved_config_reads_back_equal(tmp_path: Path):
    got = parse("--aug.scale", "[0.5, 1]", "--optim.betas", "[0.9, 0.95]", "--rpe", "null")
    (tmp_path / "resolved.yaml").write_text(config.dump(got))
    again = parse("--config", str(tmp_path / "resolved.yaml"))
    assert asdict(again) == asdict(got)
    assert got.aug.scale == (0.5, 1)
    assert got.optim.betas == (0.9, 0.95)


def test_every_option_is_explained(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    for key, hint in config.keys(ClsConfig).items():
        if not hasattr(hint, "__dataclass_fields__"):
            start = text.index(f"--{key} ")
            words = text[start:].partition("(type")[0].split()
            assert len(words) >= 4, f"{key} has no explanation: {words}"


@pytest.mark.parametrize(
    "given",
    [
        ["--model.kwargs", "depth=6", "num_heads=3"],
        ["--model.kwargs=depth=6,num_heads=3"],
        ["--model.kwargs", "depth=6,num_heads=3"],
        ["--model.kwargs", "{depth: 6, num_heads: 3}"],
        ["--model.kwargs.depth=6", "--model.kwargs.num_heads", "3"],
    ],
)
def test_mappings_as_pairs(given: list[str]):
    got = parse(*given, "--epochs=3")
    assert (got.model.kwargs, got.epochs) == ({"depth": 6, "num_heads": 3}, 3)


BAD = [
    (["--model.kwargs={patch_size:4}"], ["'{patch_size:4}'", "{patch_size: 4}", "patch_size=4"]),
    (["--model.kwargs", "{a: 1, b:2}"], ["'b:2'", "needs a space"]),
    (["--optim.kwargs={eps:1}"], ["optim.kwargs", "eps=1"]),
    (["--learning_rate=3"], ["did you mean 'optim.lr'"]),
    (["--num-workers=3"], ["did you mean 'data.workers'"]),
    (["--model.drop_rate=3"], ["did you mean 'model.drop'"]),
    # arguments, and what the one line must contain
    (["--epoch", "3"], ["'epoch'", "did you mean 'epochs'", "valid keys: ", "rpe", "batch_size"]),
    (["--model.nmae=x"], ["'model.nmae'", "'model.name'", "valid keys of 'model'", "img_size"]),
    (["--mixup=1"], ["'mixup'", "did you mean 'aug.mixup'"]),
    (["--epochs", "many"], ["epochs", "'many'", "a whole number"]),
    (["--epochs", "2.5"], ["epochs", "'2.5'", "a whole number"]),
    (["--model.img_size", "big"], ["model.img_size", "'big'", "a whole number or null"]),
    (["--run.precision=fp8"], ["run.precision", "'fp8'", "fp32, bf16, fp16"]),
    (["--optim.table_decay", "maybe"], ["optim.table_decay", "'maybe'", "true or false"]),
    (["--aug.scale=[1,2,3]"], ["aug.scale", "[1, 2, 3]", "a list of"]),
    (["--model.kwargs", "3"], ["model.kwargs", "'3'", "a mapping"]),
    (["--epochs"], ["--epochs has no value", "a whole number"]),
    (["stray"], ["stray"]),
    (["--config", "absent.yaml"], ["absent.yaml", "No such file"]),
]


@pytest.mark.parametrize(("arguments", "parts"), BAD, ids=[" ".join(bad[0]) for bad in BAD])
def test_bad_arguments(arguments: list[str], parts: list[str]):
    with pytest.raises(UserError, match=r"\A.*\Z") as caught:  # one line
        parse(*arguments)
    assert [part for part in parts if part not in str(caught.value)] == [], caught.value


BAD_YAML = [
    ("modle: {name: x}", ["'modle'", "did you mean 'model'", "valid keys: ", "rpe"]),
    ("model: {nmae: x}", ["'model.nmae'", "did you mean 'model.name'"]),
    ("smoothing: 0.1", ["'smoothing'", "did you mean 'aug.smoothing'"]),
    ("epochs: [1", ["not valid YAML"]),
    ("- 1\n- 2", ["key: value"]),
    ("epochs: soon", ["epochs", "'soon'", "a whole number"]),
    ("model: 3", ["model", "3"]),
    ("model: !!python/object/apply:os.system ['true']", ["not valid YAML", "python/object"]),
]


@pytest.mark.parametrize(("text", "parts"), BAD_YAML, ids=[text for text, _ in BAD_YAML])
def test_bad_yaml(text: str, parts: list[str], tmp_path: Path):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"\A.*\Z") as caught:  # one line
        parse("--config", str(file))
    assert [part for part in parts if part not in str(caught.value)] == [], caught.value
