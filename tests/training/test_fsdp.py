"""FSDP2 on two processes: the gradients and weights of plain training, tables sharded too."""

from pathlib import Path

import pytest
import torch
from cls_command import ROOT
from processes import launch

from training.distributed import make_accelerator
from training.errors import UserError
from training.options import RunConfig


def test_a_sharded_step_is_a_plain_one(tmp_path: Path):
    printed = launch(2, ROOT / "tests/training/fsdp_step.py", str(tmp_path / "held.pt"))
    for model, held in torch.load(tmp_path / "held.pt").items():
        for key, (grad, wanted, weight, wanted_weight) in held.items():
            assert wanted.abs().max() > 0 or "qkv.bias" in key, (model, key)
            torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-12, msg=key)
            torch.testing.assert_close(weight, wanted_weight, rtol=1e-9, atol=1e-12, msg=key)
        tables = [key for key in held if "lookup_table" in key]
        assert len(tables) == 6  # two layers, on q, k and v
        for key in tables:
            lines = [line for text in printed for line in text.splitlines()]
            lying = [line.split("] [")[1] for line in lines if line.startswith(f"{model} {key} ")]
            # A table for each head: a head for each process. A shared one lies on the first.
            heads = "10" if model == "shared" else "11"
            assert "".join(sorted((part[0] for part in lying), reverse=True)) == heads, printed


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DEEPSPEED"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "grad_accum_steps"),
    ],
)
def test_what_the_launcher_asks_for_is_refused(monkeypatch, name: str, value: str, says: str, cls):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"accelerate launch is set to.*{says}"):
        make_accelerator(RunConfig(device="cpu"))
    status, _, err = cls("--run.device=cpu")
    assert status == 2 and err.count("\n") == 1 and says in err


def test_one_process_in_the_place_of_several_is_refused(monkeypatch):
    """What ``accelerate launch --cpu --num_processes=2`` sets for the one process it starts."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="starts one process.*use torchrun"):
        make_accelerator(RunConfig(device="cpu"))
