"""The benchmarks run whole, at toy sizes, beside a stand-in for the original's file."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import irpe.functional
from irpe.backends import BACKENDS, reference

ROOT = Path(__file__).parents[2]
CPU = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
GPU = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

STAND_IN = '''
"""The original's names over irpe's modules."""
from easydict import EasyDict
import irpe


def get_rpe_config(**given):
    return EasyDict(given)


def build_rpe(config, head_dim, num_heads):
    c = config
    spec = irpe.RPE(ratio=c.ratio, method=c.method, mode=c.mode, shared=c.shared_head, on=c.rpe_on)
    modules = irpe.build_rpe(spec, head_dim=head_dim, num_heads=num_heads, prefix=int(c.skip))
    for module in modules:
        if module is not None:
            module.register_forward_pre_hook(sized, with_kwargs=True)
    return modules


def sized(module, args, size):
    """The original guesses a square."""
    side = int(args[0].shape[-2] ** 0.5)
    return args, size or {"height": side, "width": side}
'''


def run(script, *arguments, env=CPU):
    command = [sys.executable, f"benchmarks/{script}.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, env=env)


def measured(folder, script, *given, env=CPU):
    """What a benchmark writes into its file of results."""
    done = run(script, *given, "--name", folder / "figures", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "figures.json").read_text())


@pytest.fixture
def wrong(monkeypatch):
    """Return ``wrong(backend)``, which makes it compute terms on keys wrongly."""

    def attention(call):
        out = reference.attention(call)
        return out * 1.01 if any(term.kind == "key" for term in call.terms) else out

    return lambda name: monkeypatch.setitem(
        BACKENDS, name, replace(BACKENDS[name], attention=attention)
    )


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.mark.full
def test_models(tmp_path):
    (tmp_path / "irpe.py").write_text(STAND_IN)
    given = ["--model", "test_vit", "--size", "160", "--batch", "1", "--rounds", "2"]
    figures = measured(tmp_path, "models", *given, "--original", tmp_path)
    originals = {"original k", "original qk", "original qkv"}
    assert set(figures["rows"]) == {"plain", "plain again", "k", "qk", "qkv"} | originals
    for name, row in figures["rows"].items():
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"], name
        assert (row["peak_mib"] is None) == (name == "plain again")


def test_text_attention(tmp_path):
    given = ["--length", "48", "--dim", "16", "--batch", "1", "--rounds", "2"]
    figures = measured(tmp_path, "text_attention", *given)
    assert set(figures["specs"]) < set(figures["rows"])
    assert figures["rows"]["shaw"]["over_materialised"]["median"] > 0


@pytest.mark.full
def test_grids(tmp_path):
    figures = measured(tmp_path, "grids", "--dim", 12, "--rounds", 2)
    assert [(case["batch"], case["train"]) for case in figures["cases"]] == [(1, False), (4, True)]
    for case in figures["cases"]:
        assert case["rows"].keys() == {"plain", "plain again", "own"}
        assert case["rows"]["own"]["ratio"]["median"] > 0


@pytest.mark.full
def test_models_under_autocast(tmp_path):
    """What a GPU does, but for the GPU: several cases, and a row that cannot be."""
    (tmp_path / "irpe.py").write_text(STAND_IN.replace("with_kwargs", "mistyped"))
    given = ["--model", "test_vit", "--size", "160", "--batch", "1", "2", "--rounds", "2", "--amp"]
    figures = measured(tmp_path, "models", *given, "--original", tmp_path)
    assert figures["left_out"] == []
    assert [(case["model"], case["batch"]) for case in figures["cases"]] == [
        ("test_vit", 1), ("test_vit", 2)
    ]  # fmt: skip
    for case in figures["cases"]:
        for name in ("plain", "plain again", "k", "qk", "qkv"):
            assert case["rows"][name]["ratio"]["median"] > 0
        assert "mistyped" in case["rows"]["original k"]["cannot"]


@pytest.mark.full
def test_encoder(tmp_path):
    given = ["--encoder", "--grid", "3x4", "2x5", "--layers", "1", "--rounds", "2"]
    figures = measured(tmp_path, "models", *given, "--device", "cpu")
    assert [case["grid"] for case in figures["cases"]] == ["3x4", "2x5"]
    assert figures["left_out"] == []
    for case in figures["cases"]:
        assert set(case["rows"]) == {"plain", "plain again", "bias", "k", "qk", "qkv"}
        for name, row in case["rows"].items():
            assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"], name
            assert (row["peak_mib"] is None) == (name == "plain again")


def test_a_wrong_encoder_is_not_timed(benchmarks, wrong, monkeypatch):
    import encoder

    assert encoder.gate("3x4", "cpu", False, "eager") is None
    wrong("eager")
    monkeypatch.setattr(irpe.functional, "KNOWN", {})  # calls that the right one was chosen for
    assert "qk: " in encoder.gate("3x4", "cpu", False, "eager")


@pytest.mark.full
def test_without_the_original(tmp_path):
    for script, code in (("models", 1), ("attention", 2)):
        given = ["--tiny"] if script == "attention" else []
        done = run(script, *given, "--original", tmp_path)
        assert done.returncode == code
        assert "there is no irpe.py" in done.stderr


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))]  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("device", DEVICES)
def test_attention(device, tmp_path):
    (tmp_path / "irpe.py").write_text(STAND_IN)
    given = ["--tiny", "--device", device, "--original", tmp_path]
    figures = measured(tmp_path, "attention", *given, env=CPU if device == "cpu" else GPU)
    assert (tmp_path / "figures.png").stat().st_size > 10_000
    assert figures["left_out"] == []
    assert [(c["dtype"], c["method"]) for c in figures["cases"]] == [
        ("float32", "product"), ("float16", "cross")
    ]  # fmt: skip
    modes = ["bias", "k", "qk", "qkv"]
    for case in figures["cases"]:
        assert case["gate"] == dict.fromkeys(["no terms", *modes], "passed")
        rows = case["rows"]
        timed = [case["base"], "control", "no terms"]
        ways = ("triton", "flat index", "original")
        timed += [f"{mode} {way}" for mode in modes for way in ways]
        timed += [f"{mode} sdpa" for mode in modes[:3]] + ["qkv eager"]
        for way in timed:
            for kind in ("forward", "both"):
                found = rows[way][kind]
                assert found["ms"] > 0 and found["ratio"]["median"] > 0, way
                assert way == "control" or (found["mib"] is None) == (device == "cpu")
            assert rows[way].get("differs", 0.0) < 0.02, way
        assert "probabilities" in rows["qkv flex"]["cannot"]
        assert "value terms" in rows["qkv sdpa"]["cannot"]
        if device == "cpu":
            assert rows["k flex"]["forward"]["ms"] > 0 and rows["k flex"]["differs"] < 0.02
            assert rows["k flex"]["both"] == {"cannot": "no backward on cpu"}


@pytest.mark.full
def test_a_wrong_kernel_is_not_timed(benchmarks, wrong):
    from attention import cases
    from session import RED, Session, Settings

    wrong("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    session = Session(
        cases(device, tiny=True)[0], Settings(device, 1, 1, None), {}, lambda step: None
    )
    case = session.figures()
    assert case["gate"]["k"] == "passed" and "ms" in case["rows"]["k triton"]["both"]
    for mode in ("qk", "qkv"):
        assert case["gate"][mode].startswith(RED)
        assert case["rows"][f"{mode} triton"] == {"cannot": "its gate has not passed"}
        assert "ms" in case["rows"][f"{mode} flat index"]["both"]


def test_what_hangs_or_dies_costs_itself_only(benchmarks, monkeypatch):
    import attention

    tried = []

    class Scripted:
        """Dies in one way of computing, hangs in another, loses one case while it is timed."""

        def __init__(self, settings):
            self.stopped = False

        def measure(self, case, without, until):
            assert not self.stopped
            tried.append((case.method, sorted(without)))
            for how, step in (("died", "k sdpa"), ("hangs", "qk flex")):
                if step not in without:
                    return how, f"it {how}", step
            if case.method == "euc":
                return "fatal", "CUDA error", "timing both"
            return ("time", "", "") if case.dtype == "float32" else ("done", {"rows": {}}, "")

        def stop(self):
            self.stopped = True

    monkeypatch.setattr(attention, "Worker", Scripted)
    given = {"height": 2, "width": 2, "prefix": 0, "dim": 16, "heads": 1, "batch": 1}
    order = [
        attention.Case(**given, dtype=dtype, method=method)
        for dtype, method in (
            ("bfloat16", "product"), ("bfloat16", "euc"), ("bfloat16", "cross"),
            ("float32", "product"), ("float32", "cross"),
        )
    ]  # fmt: skip
    done = []
    left = attention.drive(order, None, float("inf"), done.append)
    assert tried == [
        ("product", []),
        ("product", ["k sdpa"]),
        ("product", ["k sdpa", "qk flex"]),
        ("euc", ["qk flex"]),  # what hung is not tried again, what died once is
        ("euc", ["k sdpa", "qk flex"]),
        ("cross", ["k sdpa", "qk flex"]),
        ("product", ["k sdpa", "qk flex"]),
    ]
    assert [case.get("cannot") for case in done] == [None, "timing both: CUDA error", None]
    assert left == [str(case) for case in order[3:]]


@pytest.mark.full
def test_startup():
    done = run("startup", "--rounds", "1", "--warmup", "0")
    assert done.returncode == 0, done.stderr
    rows = {line[:20].strip(): line[20:].split() for line in done.stdout.splitlines()}
    assert all(float(rows[name][0]) > 0 for name in ("plain", "import irpe", "irpe --help"))
