"""Ways to train what does not fit: sharded weights, recomputed activations, half precision."""

import itertools

import pytest
import torch
from processes import launch
from run_files import newest_state

from training.cls.model import build_model
from training.cls.options import ClsConfig, ModelConfig
from training.engine import make_accelerator
from training.loop import Loop

SHARDED = """
import timm, torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
import irpe

def build():
    torch.manual_seed(0)
    size = dict(patch_size=4, embed_dim=16, depth=2, num_heads=2)
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=5, **size)
    irpe.attach(model, "rpe-2.0-product-ctx-1-qkv")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lookup_table" in name:
                parameter.normal_()
    return model.double()

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
plain, sharded = build(), build()
for block in sharded.blocks:
    fully_shard(block, mesh=dist.device_mesh.init_device_mesh("cpu", (world,)))
fully_shard(sharded, mesh=dist.device_mesh.init_device_mesh("cpu", (world,)))
torch.manual_seed(1)
images, targets = torch.randn(6, 3, 16, 16).double(), torch.arange(6) % 5
loss = torch.nn.functional.cross_entropy
loss(plain(images), targets).backward()
half = slice(3 * rank, 3 * rank + 3)
loss(sharded(images[half]), targets[half]).backward()
own, tables = dict(plain.named_parameters()), 0
for name, parameter in sharded.named_parameters():
    assert isinstance(parameter, DTensor) and isinstance(parameter.grad, DTensor), name
    torch.testing.assert_close(parameter.grad.full_tensor(), own[name].grad, rtol=1e-9, atol=1e-12)
    tables += "lookup_table" in name and bool(own[name].grad.abs().max() > 0)
assert tables == 6, tables
print("equal")
dist.destroy_process_group()
"""


def test_fully_shard_gives_the_same_gradients(tmp_path):
    """FSDP2 on two processes; tables are sharded like any parameter."""
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    assert [output.strip().splitlines()[-1] for output in launch(2, script)] == ["equal", "equal"]


def test_fsdp_of_accelerate_is_refused(cls, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    status, _, err = cls()
    assert status == 2 and err.count("\n") == 1
    assert "ACCELERATE_USE_FSDP" in err and "DDP" in err


@pytest.mark.parametrize("spec", [None, "rpe-2.0-product-ctx-1-qkv"])
def test_recomputed_activations_give_the_same_gradients(spec):
    gradients, calls = [], []
    for recompute in (False, True):
        kwargs = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
        options = ModelConfig(
            name="vit_tiny_patch16_224", img_size=16, kwargs=kwargs, grad_checkpointing=recompute
        )
        torch.manual_seed(0)
        model = build_model(ClsConfig(rpe=spec, model=options), 5).double().train()
        counted: list[int] = []
        model.blocks[0].mlp.register_forward_pre_hook(lambda *given, c=counted: c.append(1))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lookup_table" in name:
                    parameter.normal_()
        torch.manual_seed(1)
        model(torch.randn(2, 3, 16, 16).double()).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        calls.append(len(counted))
    assert calls == [1, 2]
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())


@pytest.fixture
def scaled(monkeypatch):
    """fp16 on a CPU, with a scaler that has one: accelerate would want a GPU for it."""
    real = make_accelerator

    def make(config):
        accelerator = real(config)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        accelerator.native_amp = True
        accelerator.state._mixed_precision = "fp16"
        return accelerator

    monkeypatch.setattr("training.lm.run.make_accelerator", make)


@pytest.mark.parametrize("clip", ["null", "1.0"])
def test_a_scaler_survives_an_overflow(clip, lm, scaled, tmp_path, monkeypatch):
    """The step is left out and the scale halved; neither is taken for a fault."""
    real, scales, weights = Loop._one_step, [], []

    def step(self, *given):
        hook = None
        if self.step == 4:
            parameter = next(self.raw.parameters())
            hook = parameter.register_hook(lambda gradient: gradient * float("inf"))
        weights.append([p.detach().clone() for p in self.raw.parameters()])
        count = real(self, *given)
        if hook is not None:
            hook.remove()
        scales.append(self.accelerator.scaler.get_scale())
        return count

    monkeypatch.setattr(Loop, "_one_step", step)
    options = ["--run.experiment=x", f"--optim.clip_grad={clip}", "--sample=0"]
    status, _, err = lm(*options)
    assert status == 0, err
    assert scales == [1024.0] * 4 + [512.0] * 8
    same = [all(map(torch.equal, a, b)) for a, b in itertools.pairwise(weights)]
    assert same == [number == 4 for number in range(11)]
    assert newest_state(tmp_path / "runs" / "x")["scaler"]["scale"] == 512.0
