"""Shared by all tests: two threads, fixed seeds, paths of the official numbers."""

import importlib.machinery
import importlib.util
import os
import random
import sys
import types

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pathlib import Path

import numpy as np
import pytest
import torch
from common import FIXTURES

if importlib.util.find_spec("hypothesis") is None:  # benchmarks/gpu.sh needs few packages
    absent = types.ModuleType("hypothesis")
    absent.__spec__ = importlib.machinery.ModuleSpec("hypothesis", None)  # torch looks for it
    absent.given = lambda **given: pytest.mark.skip(reason="hypothesis is not installed")
    absent.settings = lambda *args, **given: lambda test: test
    absent.HealthCheck = absent.Phase = ()
    absent.settings.register_profile = absent.settings.load_profile = lambda *args, **given: None
    absent.strategies = types.ModuleType("hypothesis.strategies")
    absent.strategies.data = lambda: None
    sys.modules |= {"hypothesis": absent, "hypothesis.strategies": absent.strategies}

from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when irpe is imported

torch.set_num_threads(2)

# The same inputs in each run; IRPE_FUZZ=COUNT draws new ones.
settings.register_profile("irpe", derandomize=not int(os.environ.get("IRPE_FUZZ", "0")))
settings.load_profile("irpe")


def pytest_collection_modifyitems(items):
    """Mark as ``full`` what a test has beyond the number of its marker ``cases``."""
    groups = {}
    for item in items:
        if marker := item.get_closest_marker("cases"):
            groups.setdefault((item.location[0], item.originalname), (marker.args[0], []))[
                1
            ].append(item)
    for (_, name), (kept, cases) in groups.items():
        for item in random.Random(name).sample(cases, max(0, len(cases) - kept)):
            item.add_marker(pytest.mark.full)


@pytest.fixture(autouse=True, scope="session")
def _interpreter():
    """Let Triton's interpreter round a dot product once, whatever the order of its sum.

    Its own way is NumPy's, where a @ b and the transpose of b.T @ a.T may round differently,
    depending on the processor; on a GPU they are the same, and the backward pass relies on it.

    It also replaces triton.language again at each call of a function in a kernel, which takes a
    third of the time: here once for each module.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def create_dot(self, a, b, d, *options):
        total = a.data.astype(np.float64) @ b.data.astype(np.float64) + d.data
        return interpreter.TensorHandle(total.astype(d.data.dtype), d.dtype.scalar)

    replaced = set()

    def call(self, *args, **given):
        if self.fn.__module__ not in replaced:
            replaced.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _forget():
    """No call was validated before, so that a test can change what is asked then."""
    from irpe.backends import KNOWN, triton

    KNOWN.clear()
    triton._CODES.clear()


@pytest.fixture(autouse=True)
def _tiles(request, monkeypatch):
    """No call of a test is too small for eager's own passes."""
    from irpe.backends import eager
    from irpe.backends.eager import rows, workspace

    monkeypatch.setattr(eager, "SMALL", 0)
    marker = request.node.get_closest_marker("tiles")
    if marker is not None:
        monkeypatch.setattr(eager, "keeps", lambda call: False)
        monkeypatch.setattr(workspace, "SIZE", *marker.args)
        monkeypatch.setattr(rows, "MOST", 99.0)  # in small grids few blocks repeat


@pytest.fixture
def fixtures() -> Path:
    """Folder with the numbers of the official code."""
    return FIXTURES


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels launched; and all memory they are given is full of NaN before."""
    from irpe.backends.triton import launch, lookup

    names = []
    start_lookup = lookup._start
    start, new_empty, empty_like = launch.launch, torch.Tensor.new_empty, torch.empty_like

    def counted(step, tensors):
        names.append(step.name)
        return start(step, tensors)

    def counted_lookup(name, *args, **given):
        names.append(name)
        return start_lookup(name, *args, **given)

    def poisoned(make):
        def call(*args, **given):
            made = make(*args, **given)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return call

    monkeypatch.setattr(launch, "launch", counted)
    monkeypatch.setattr(lookup, "_start", counted_lookup)
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(new_empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))
    return names
