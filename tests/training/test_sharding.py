"""run.shard on two processes: the run that DDP makes, whole files, and what it does not go with."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.distributed as dist
from cls_command import ROOT
from cls_command import TINY as CLS
from lm_command import TINY as TEXT
from processes import launch
from run_files import newest_state, records, same, weights
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

import irpe
from training.distributed import Sharded, layers_of
from training.errors import UserError
from training.options import RunConfig

SPEC = "rpe-1.9-product-ctx-0-qkv"
# Averages, clipping, and several passes of a step. Gradients that are rounding alone, as those of
# the keys' biases, must not decide a step: hence epsilon.
IMAGES = [*CLS, f"--rpe={SPEC}", "--ema.enabled", "--ema.decay=0.5", "--optim.eps=1e-3"]
IMAGES += ["--grad_accum_steps=2", "--run.save_steps=3", "--optim.clip_grad=1.0"]
# One table for all layers, tied weights, and memories from step to step. 300 scored tokens are five
# batches for two processes: one evaluates three, the other two.
TEXTS = [*TEXT, "--encoding=t5", "--memory=1", "--order=stripes", "--sample=0", "--optim.eps=1e-3"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, book) -> SimpleNamespace:
    """Runs of two processes: folders by their names, and what each process printed."""
    output = tmp_path_factory.mktemp("runs")
    entries = []

    def add(script: str, tiny: list[str], name: str, *more: str, **also) -> None:
        given = [*tiny, "--run.device=cpu", f"--run.output={output}", f"--run.experiment={name}"]
        entries.append({"script": script, "arguments": [*given, *more], **also})

    add("train_cls", IMAGES, "plain")
    add("train_cls", IMAGES, "sharded", "--run.shard")
    copied = [str(output / "parts"), str(output / "copied")]
    add("train_cls", IMAGES, "parts", "--run.shard", stop=7, copy=copied)
    add("train_cls", IMAGES, "parts", "--run.shard", "--resume=auto")
    texts = [*TEXTS, f"--data.root={book}"]
    add("train_lm", texts, "plain-text")
    add("train_lm", texts, "sharded-text", "--run.shard")
    (output / "entries.json").write_text(json.dumps(entries))
    script = ROOT / "tests/training/shard_runs.py"
    printed = launch(2, script, str(output / "entries.json"))
    for text in printed:
        ended = [line for line in text.splitlines() if line.startswith("ended")]
        assert ended == ["ended 0", "ended 0", "ended 143", *["ended 0"] * 3], printed
    return SimpleNamespace(output=output, printed=printed)


def assert_near(one: Path, other: Path, names: tuple[str, ...]) -> None:
    """The same results and weights, up to rounding."""
    for a, b in zip(records(one), records(other), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            wanted = pytest.approx(a[key], rel=1e-4) if isinstance(a[key], float) else a[key]
            assert b[key] == wanted, key
    for name in names:
        ours, theirs = weights(one, name), weights(other, name)
        for key in ours:
            torch.testing.assert_close(theirs[key], ours[key], rtol=1e-3, atol=1e-4, msg=key)


def test_a_sharded_run_is_that_of_ddp(runs):
    output = runs.output
    assert_near(output / "plain", output / "sharded", ("best", "last", "last-ema"))
    assert_near(output / "plain-text", output / "sharded-text", ("best", "last"))
    counts = [record["tokens"] for record in records(output / "sharded-text")]
    assert counts == [300] * 4  # each once, by whichever process


def test_tables_are_sharded(runs):
    tables = {
        f"table blocks.{layer}.attn.rpe_{on}.lookup_table_weight {shape}"
        for layer in (0, 1)
        for on, shape in (("q", "[2, 8, 50] [1, 8, 50]"), ("v", "[2, 50, 8] [1, 50, 8]"))
    }
    for text in runs.printed:  # a table for each head, a head for each process
        assert tables | {"table body.for_all.t5.table [2, 32] [1, 32]"} <= set(text.splitlines())


def test_it_goes_on_bit_for_bit(runs):
    whole, parts = runs.output / "sharded", runs.output / "parts"
    assert newest_state(runs.output / "copied")["step"] == 8
    assert len(records(runs.output / "copied")) == 1
    assert records(whole) == records(parts) and same(whole, parts, "best", "last", "last-ema")
    state, again = newest_state(whole), newest_state(parts)
    for key, value in state["model"].items():
        assert torch.equal(value, again["model"][key]), key
    for index, kept in state["optimizer"]["state"].items():
        for key, value in kept.items():
            assert torch.equal(value, again["optimizer"]["state"][index][key]), (index, key)


def test_a_state_is_that_of_a_plain_run(runs):
    """Plain tensors of the same names, shapes and types; sharded or not, it is the same file."""
    plain, sharded = (newest_state(runs.output / name) for name in ("plain", "sharded"))
    assert described(sharded) == described(plain)


def described(value):
    if isinstance(value, torch.Tensor):
        return type(value), value.shape, value.dtype, value.device
    if isinstance(value, dict):
        return {key: described(part) for key, part in value.items()}
    return [described(part) for part in value] if isinstance(value, list | tuple) else type(value)


def test_one_process_goes_on_and_evaluates(runs, cls, tmp_path: Path):
    """A run that was begun sharded; and the weights that one left."""
    (tmp_path / "runs").mkdir()
    shutil.copytree(runs.output / "copied", tmp_path / "runs" / "alone")
    arguments = [*IMAGES[len(CLS) :], "--run.device=cpu", "--run.experiment=alone"]
    status, _, err = cls(*arguments, "--resume=auto")
    assert status == 0, err
    assert_near(runs.output / "sharded", tmp_path / "runs" / "alone", ("last", "last-ema"))
    last = runs.output / "sharded" / "checkpoints" / "last-ema.safetensors"
    # As from a configuration file that says run.shard: an evaluation has nothing to shard.
    given = [f"--rpe={SPEC}", f"--checkpoint={last}", "--eval-only", "--run.shard"]
    status, out, err = cls(*given, "--run.device=cpu")
    assert status == 0, err
    accuracy = records(runs.output / "sharded")[-1]["ema_top1"]
    assert f"held-out accuracy {100 * accuracy:.2f} %" in out


def test_what_it_does_not_go_with(cls):
    status, _, err = cls("--run.shard")
    assert status == 2 and err.count("\n") == 1 and "start them with torchrun" in err
    for other in ("precision=fp16", "compile=true"):
        status, _, err = cls("--run.shard", f"--run.{other}")
        assert status == 2 and f"run.{other.replace('=', ': ')}" in err


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("vit_tiny_patch16_224", {"Block": 12}),
        ("swin_tiny_patch4_window7_224", {"SwinTransformerBlock": 12}),
        ("eva02_tiny_patch14_224", {"EvaBlock": 12}),
        ("maxvit_tiny_rw_224", {"MaxxVitBlock": 11}),
        ("resnet18", {}),  # sharded as one
    ],
)
def test_layers_of_timm(name: str, layers: dict[str, int]):
    with torch.device("meta"):
        found = [type(layer).__name__ for layer in layers_of(timm.create_model(name))]
    assert {kind: found.count(kind) for kind in found} == layers


@pytest.fixture
def group(tmp_path: Path):
    """A group of one process, and what stands for accelerate's view of it."""
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield SimpleNamespace(
        is_main_process=True,
        device=torch.device("cpu"),
        num_processes=1,
        prepare_model=lambda model, evaluation_mode: model,
    )
    dist.destroy_process_group()


def tiny() -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", **sizes, num_classes=5)
    irpe.attach(model, SPEC)
    return model


def test_every_parameter_lies_in_a_layer_or_in_the_root(group):
    sharded = Sharded(tiny(), group, RunConfig(shard=True, precision="bf16"))
    assert [isinstance(block, FSDPModule) for block in sharded.model.blocks] == [True, True]
    for name, parameter in sharded.model.named_parameters():
        assert isinstance(parameter, DTensor) and parameter.placements == (Shard(0),), name
        assert parameter.dtype == torch.float32, name
    assert not any(isinstance(p, DTensor) for p in sharded.whole.parameters())


def test_an_optimiser_that_cannot_be_saved_is_told(group):
    sharded = Sharded(tiny(), group, RunConfig(shard=True))
    optimizer = torch.optim.AdamW(sharded.model.parameters())
    sharded.model(torch.zeros(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert sharded.full(optimizer)["state"][0]["exp_avg"].shape == (1, 1, 16)
    first = next(sharded.model.parameters())
    optimizer.state[first]["rows"] = torch.zeros(3)
    with pytest.raises(UserError, match="differs in shape from the weights"):
        sharded.full(optimizer)
