"""fp16 with a gradient scaler: a step whose gradient overflows is skipped."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer

from training.cls.classify import Classify
from training.distributed import make_accelerator
from training.options import RunConfig

FIRST_SCALE = 1024.0
OVERFLOWS = 3  # the step, counted from 0


@pytest.fixture
def scaled(monkeypatch):
    """accelerate's fp16 on a CPU, which it takes GPUs for; the scales and weights of each step."""
    seen = []
    accelerator = make_accelerator(RunConfig(device="cpu"))
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=FIRST_SCALE)
    monkeypatch.setattr("training.run.make_accelerator", lambda config: accelerator)
    loss, step = Classify.loss, AcceleratedOptimizer.step

    def overflowing(self, model, batch, number):
        result = loss(self, model, batch, number)
        if number == OVERFLOWS:
            result.loss = result.loss * 1e7
        return result

    def noted(self, *given):
        weights = [p for group in self.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in weights]
        found = step(self, *given)
        moved = any(not torch.equal(a, b) for a, b in zip(before, weights, strict=True))
        seen.append((accelerator.scaler.get_scale(), moved))
        return found

    monkeypatch.setattr(Classify, "loss", overflowing)
    monkeypatch.setattr(AcceleratedOptimizer, "step", noted)
    return seen


@pytest.mark.parametrize("clip", ["null", "1.0"])
def test_an_overflow_is_survived(cls, scaled, clip: str, tmp_path: Path):
    options = ["--rpe=rpe-1.9-product-ctx-1-qkv", f"--optim.clip_grad={clip}", "--epochs=2"]
    status, _, err = cls(*options, "--run.experiment=x", "--run.device=cpu")
    assert status == 0, err
    scales, moved = zip(*scaled, strict=True)
    assert len(scales) == 10
    assert scales[:OVERFLOWS] == (FIRST_SCALE,) * OVERFLOWS
    assert set(scales[OVERFLOWS:]) == {FIRST_SCALE / 2}
    assert moved == tuple(number != OVERFLOWS for number in range(10))
    lines = (tmp_path / "runs" / "x" / "metrics.jsonl").read_text().splitlines()
    first, last = (json.loads(line) for line in lines)
    # The loss of the batch itself was counted as it was; nothing of it came into the weights.
    assert last["train_loss"] < 2.5 and last["loss"] < 2.5 and last["step"] == 10
    assert "skipped_steps" not in last
