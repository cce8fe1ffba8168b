"""Runs that are stopped within epochs and evaluations, steps that are not finite, full disks."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from run_files import files, newest_state, records, same, weights
from safetensors.torch import load_file

from training.checkpoint import States
from training.distributed import make_accelerator
from training.lm.language import Held, Language
from training.loop import Loop
from training.run_directory import RunDirectory

# Two passes a step, dropout, averaged weights, a memory: all that a state holds.
OPTIONS = [
    "--encoding=rope",
    "--order=stripes",
    "--memory=1",
    "--model.drop=0.1",
    "--ema.enabled",
    "--ema.decay=0.5",
    "--grad_accum_steps=2",
    "--sample=0",
]


@pytest.fixture
def at_step(monkeypatch):
    """Return ``at_step(number, what)``: do ``what`` in the midst of a step."""

    def patch(number, what):
        real = Loop._one_step

        def step(self, *given):
            count = real(self, *given)
            if self.step + 1 == number:
                monkeypatch.setattr(Loop, "_one_step", real)
                what()
            return count

        monkeypatch.setattr(Loop, "_one_step", step)

    return patch


@pytest.fixture(scope="module")
def whole(tmp_path_factory, book):
    """The folder of a run that nothing disturbed."""
    from lm_command import TINY

    import train_lm

    output = tmp_path_factory.mktemp("whole")
    given = [f"--data.root={book}", f"--run.output={output}", "--run.experiment=x"]
    assert train_lm.main([*TINY, *OPTIONS, *given]) == 0
    return output / "x"


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("step", [1, 5, 6, 11])
def test_sigterm_saves_after_the_step(step, lm, at_step, whole, tmp_path: Path):
    at_step(step, terminate)
    status, _, err = lm(*OPTIONS, "--run.experiment=x")
    folder = tmp_path / "runs" / "x"
    assert status == 143
    assert f"stopped by SIGTERM in epoch {(step - 1) // 3 + 1}, after step {step};" in err
    assert f"--resume {folder}" in err and err.count("\n") == 1
    told = json.loads((folder / "progress.json").read_text())
    assert (told["status"], told["step"], told["steps"]) == ("stopped", step, 12)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert lm(*OPTIONS, "--run.experiment=x", "--resume=auto")[0] == 0
    assert records(folder) == records(whole)
    assert same(folder, whole, "last", "last-ema", "best")
    assert json.loads((folder / "progress.json").read_text())["status"] == "finished"
    assert len(States(folder / "checkpoints").paths()) == 2


def test_ctrl_c_once(lm, at_step, whole, tmp_path: Path):
    at_step(4, lambda: os.kill(os.getpid(), signal.SIGINT))
    status, _, err = lm(*OPTIONS, "--run.experiment=x")
    assert status == 130 and "stopped by SIGINT" in err
    assert newest_state(tmp_path / "runs" / "x")["step"] == 4


def test_a_signal_ends_an_evaluation_at_once(lm, whole, tmp_path: Path, monkeypatch):
    real, calls = Held.metrics, []

    def figures(self, *given):
        calls.append(1)
        if len(calls) == 4:
            terminate()
            raise AssertionError("the evaluation went on")
        return real(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Held, "metrics", figures)
        assert lm(*OPTIONS, "--run.experiment=x")[0] == 143
    folder = tmp_path / "runs" / "x"
    assert len(records(folder)) == 1 and newest_state(folder)["step"] == 6
    assert lm(*OPTIONS, "--run.experiment=x", "--resume=auto")[0] == 0
    assert records(folder) == records(whole)
    assert same(folder, whole, "last", "last-ema", "best")


def test_killed_at_any_step_with_a_damaged_newest_state(lm, at_step, whole, tmp_path: Path):
    """States within epochs; the newest is damaged, so that the one before it is used."""
    at_step(11, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lm(*OPTIONS, "--run.experiment=x", "--run.save_steps=5", "--run.keep=3")
    folder = tmp_path / "runs" / "x"
    states = States(folder / "checkpoints")
    names = [path.name[:-20] for path in states.paths()]
    assert names == ["state-epoch3-step10", "state-epoch3-step9", "state-epoch2-step6"]
    for path in states.paths()[:2]:
        path.write_bytes(path.read_bytes()[:-1])
    (states.folder / ".state-epoch3-step11.7.tmp").write_bytes(b"half")
    status, _, err = lm(*OPTIONS, "--run.experiment=x", "--resume=auto", "--run.progress=lines")
    assert status == 0
    warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2 and all("using the state before it" in w for w in warnings)
    assert "resuming after epoch 2\n" in err
    assert records(folder) == records(whole)
    assert same(folder, whole, "last", "last-ema", "best")
    assert not list(states.folder.glob(".*"))


def test_states_within_epochs(lm, at_step, whole, tmp_path: Path):
    at_step(6, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lm(*OPTIONS, "--run.experiment=x", "--run.save_steps=1", "--run.save_every=9")
    folder = tmp_path / "runs" / "x"
    status, _, err = lm(*OPTIONS, "--run.experiment=x", "--resume=auto", "--run.progress=lines")
    assert status == 0 and "resuming after epoch 1 and step 5\n" in err
    assert records(folder) == records(whole)
    assert same(folder, whole, "last", "last-ema", "best")


def test_a_run_that_ended_before_its_last_files(lm, whole, tmp_path: Path, monkeypatch):
    """Trained to the end, but the scores were not written: --resume auto makes up for it."""
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write_json", lambda *given: 1 / 0)
        patch.setattr(RunDirectory, "update", lambda *given, **more: None)
        with pytest.raises(ZeroDivisionError):
            lm(*OPTIONS, "--run.experiment=x")
    folder = tmp_path / "runs" / "x"
    assert "scores.json" not in files(folder)
    status, out, _ = lm(*OPTIONS, "--run.experiment=x", "--resume=auto")
    assert status == 0 and "held-out" in out
    assert files(folder) == files(whole)
    assert (folder / "scores.json").read_text() == (whole / "scores.json").read_text()


# --- steps that are not finite --------------------------------------------------------------------


@pytest.fixture
def spoilt(monkeypatch):
    """Return ``spoilt(steps, how)``: make the losses of these steps, counted from 1, not finite."""

    def patch(steps, how=lambda loss: loss * float("nan")):
        real = Language.loss

        def loss(self, model, batch, step):
            result = real(self, model, batch, step)
            if step + 1 in steps:
                result.loss = how(result.loss)
            return result

        monkeypatch.setattr(Language, "loss", loss)

    return patch


def infinite_gradient(loss):
    """A loss that is finite, whose gradient is not."""
    return loss + torch.sqrt(loss - loss.detach())


def test_the_first_that_is_not_finite_stops(lm, spoilt, tmp_path: Path):
    spoilt([5])
    status, _, err = lm("--run.experiment=x")
    assert status == 2 and err.count("\n") == 1
    assert "the loss became nan in epoch 2, by step 5" in err
    batch = load_file(tmp_path / "runs" / "x" / "nonfinite-step5.safetensors")
    assert batch["0.batch.input_ids"].shape == (8, 16)
    assert newest_state(tmp_path / "runs" / "x")["step"] == 3


@pytest.mark.parametrize("how", [lambda loss: loss * float("nan"), infinite_gradient])
def test_figures_that_stay_on_a_gpu(how, lm, spoilt, tmp_path: Path, monkeypatch):
    """Looked at every tenth step, and before anything is saved."""
    real = Loop.__init__

    def init(self, *given):
        real(self, *given)
        self.finite.every_step = False

    monkeypatch.setattr(Loop, "__init__", init)
    options = ["--run.experiment=x", "--epochs=2", "--steps_per_epoch=9", "--run.save_steps=4"]
    spoilt([5], how)
    status, _, err = lm(*options, "--optim.clip_grad=null")
    assert status == 2
    assert "became" in err and "in epoch 1, by step 8" in err
    assert newest_state(tmp_path / "runs" / "x")["step"] == 4


@pytest.mark.parametrize("how", [lambda loss: loss * float("nan"), infinite_gradient])
@pytest.mark.parametrize("clip", ["null", "1.0"])
def test_steps_are_left_out(how, clip, lm, spoilt, tmp_path: Path):
    options = ["--run.max_skipped=2", f"--optim.clip_grad={clip}", *OPTIONS]
    spoilt([2, 8], how)
    status, _, err = lm(*options, "--run.experiment=x", "--run.progress=lines")
    assert status == 0
    assert "warning: step 2 is skipped" in err and "(2 of at most 2 by run.max_skipped)" in err
    assert [r.get("skipped_steps") for r in records(tmp_path / "runs" / "x")] == [1, 1, 2, 2]
    assert all(torch.isfinite(x).all() for x in weights(tmp_path / "runs" / "x").values())
    spoilt([2, 3, 8], how)
    status, _, err = lm(*options, "--run.experiment=y")
    assert status == 2
    assert "by step 8" in err and "after 2 skipped steps" in err
    assert newest_state(tmp_path / "runs" / "y")["skipped"] == 2


@pytest.mark.parametrize("clip", ["null", "1.0"])
def test_a_loss_that_is_not_finite_beside_a_scaler(clip, lm, spoilt, tmp_path, monkeypatch):
    """fp16 on a CPU: the step is left out by the guard, and the scale stays."""

    def make(config):
        accelerator = make_accelerator(config)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        return accelerator

    monkeypatch.setattr("training.run.make_accelerator", make)
    spoilt([5])
    options = ["--run.experiment=x", f"--optim.clip_grad={clip}", "--run.max_skipped=1"]
    status, _, err = lm(*options)
    assert status == 0, err
    state = newest_state(tmp_path / "runs" / "x")
    assert (state["skipped"], state["scaler"]["scale"]) == (1, 1024.0)


def test_a_step_left_out_changes_nothing(lm, spoilt, tmp_path: Path, monkeypatch):
    """Neither weights, nor the optimiser, nor the averaged weights."""
    seen, real = [], Loop._one_step

    def step(self, *given):
        def parts():
            run = self.context
            ema, own = run.ema.module.state_dict(), run.model.state_dict()
            moments = [v for s in run.optimizer.state.values() for v in s.values()]
            return [x.clone() for x in (*own.values(), *ema.values(), *moments)]

        before = parts()
        count = real(self, *given)
        after = parts()
        unchanged = len(before) == len(after) and all(map(torch.equal, before, after))
        seen.append(unchanged)
        return count

    monkeypatch.setattr(Loop, "_one_step", step)
    spoilt([5])
    assert lm(*OPTIONS, "--run.max_skipped=1")[0] == 0
    assert seen == [number == 5 for number in range(1, 13)]


# --- a disk that is full, or cannot be written ----------------------------------------------------


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_state_that_cannot_be_written(policy, lm, whole, tmp_path: Path, monkeypatch):
    real = torch.save

    def save(state, path):
        if isinstance(state, dict) and state.get("step") in (6, 9):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return real(state, path)

    monkeypatch.setattr(torch, "save", save)
    options = ["--run.experiment=x", f"--run.on_save_error={policy}", "--run.progress=lines"]
    status, _, err = lm(*OPTIONS, *options)
    folder = tmp_path / "runs" / "x"
    steps = [path.name[:-20] for path in States(folder / "checkpoints").paths()]
    assert not list((folder / "checkpoints").glob(".*"))
    if policy == "stop":
        assert status == 2
        assert err.splitlines()[-1].startswith("error: cannot write ")
        assert "No space left on device" in err.splitlines()[-1]
        assert steps == ["state-epoch1-step3"]
    else:
        assert status == 0
        assert err.count("training continues with the previous checkpoint") == 2
        assert steps == ["state-epoch4-step12", "state-epoch1-step3"]
    monkeypatch.setattr(torch, "save", real)
    if policy == "stop":
        assert lm(*OPTIONS, *options, "--resume=auto")[0] == 0
    assert records(folder) == records(whole) and same(folder, whole, "last", "best")
