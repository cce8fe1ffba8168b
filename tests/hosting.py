"""Properties of attach on any library; the tests of each library call these.

A case is (make, run): make(seed) builds a float64 model in training mode, without dropout, and
run(model) calls it, always on the same input.
"""

import copy
import io
import pickle

import pytest
import torch
from oracles import attention as truth
from oracles import buckets as plain
from torch import nn

import irpe

QK, QKV = (f"rpe-1.9-product-ctx-1-{on}" for on in ("qk", "qkv"))
CHECKS = ("outputs_stay", "tables_learn", "state_round_trip", "copies_are_independent",
          "compiles", "detach_undoes")  # fmt: skip


def fill(model, seed=1):
    """Random tables: from here on the encoding matters."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "lookup_table" in name:
            nn.init.normal_(p, std=0.5)
    return model


def fingerprint(model):
    return {
        name: (
            type(m),
            {
                k: v
                for k, v in vars(m).items()
                if not k.startswith("_") or k == "_qkv_same_embed_dim"
            },
            *map(len, (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)),
        )
        for name, m in model.named_modules()
    }


def outputs_stay(make, run, attach=irpe.attach):
    for training in (True, False):
        for backend in ("auto", "reference", "eager", "sdpa"):
            model = make(0).train(training)
            before = run(model)
            report = attach(model, QK if backend == "sdpa" else QKV, backend=backend)
            assert report.parameters == sum(
                p.numel() for n, p in model.named_parameters() if "lookup_table" in n
            )
            torch.testing.assert_close(run(model), before, rtol=1e-9, atol=1e-10)
            with torch.no_grad():  # torch's own short cuts go round the modules then
                torch.testing.assert_close(run(model), before, rtol=1e-9, atol=1e-10)
                assert not torch.allclose(run(fill(model)), before, atol=1e-3), "not reached"


def tables_learn(make, run, attach=irpe.attach):
    """After one step from the start every new table has moved, and the model's own weights."""
    model = make(0)
    keys = attach(model, QKV).keys
    optimizer = torch.optim.SGD(irpe.param_groups(model, lr=0.1, table_lr=1.0), lr=0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run(model).square().sum().backward()
    optimizer.step()
    after = dict(model.named_parameters())
    assert keys and all(not torch.equal(after[n], before[n]) for n in keys)
    assert sum(not torch.equal(after[n], before[n]) for n in before) > 2 * len(keys)


def state_round_trip(make, run, attach=irpe.attach):
    model, other = make(0), make(5)
    own = list(model.state_dict())
    report = attach(model, QKV)
    attach(other, QKV)
    assert set(model.state_dict()) == {*own, *report.keys}
    fill(model)
    assert not torch.allclose(run(other), run(model), atol=1e-3)
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(other), run(model))


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def copies_are_independent(make, run, attach=irpe.attach):
    model = make(0)
    attach(model, QKV)
    wanted = run(fill(model))
    for copied in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved):
        other = copied(model)
        assert torch.equal(run(other), wanted)
        fill(other, seed=9)
        assert torch.equal(run(model), wanted) and not torch.allclose(run(other), wanted)
        irpe.detach(other)
        assert torch.equal(run(model), wanted)
        attach(other, QK)


def compiles(make, run, attach=irpe.attach):
    """run(model) must be one graph, and its gradients those of the model itself."""
    model = make(0)
    attach(model, QKV)
    fill(model)
    wanted = run(model)
    wanted.square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    found = run(torch.compile(model, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)
    found.square().sum().backward()
    for name, grad in grads.items():
        mine = model.get_parameter(name).grad
        torch.testing.assert_close(mine, grad, rtol=1e-8, atol=1e-9, msg=name)


def exports(make, run, args, kwargs=None, attach=irpe.attach):
    model = make(0).eval()
    attach(model, QKV)
    wanted = run(fill(model))
    for strict in (False, True):
        program = torch.export.export(model, args, kwargs, strict=strict)
        found = run(program.module())
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)
        assert torch.equal(run(model), wanted), "the export left something behind"


def detach_undoes(make, run, attach=irpe.attach):
    model = make(0)
    before, state, output = fingerprint(model), list(model.state_dict()), run(model)
    attach(model, QKV)
    run(fill(model))
    irpe.detach(model)
    assert fingerprint(model) == before and list(model.state_dict()) == state
    assert torch.equal(run(model), output)
    attach(model, QK)  # and again
    torch.testing.assert_close(run(model), output, rtol=1e-9, atol=1e-10)


def by_loops(module, projected, out, places):
    """What a layer's attention gives, by loops; axes in reverse order must give another thing.

    Args:
        module: holds rpe_q, rpe_k and rpe_v of the spec QKV.
        projected: q, k, v ``[B, H, L, D]``.
        out: the output projection.
        places: (row, column) or (frame, row, column) of each sample's tokens, None for prefix.
    """
    axes = next(len(place) for place in places[0] if place is not None)
    (function,) = plain.buckets(irpe.parse(QKV), axes)
    names = [(on, getattr(module, f"rpe_{on}").table, function) for on in "qkv"]
    results = []
    for sides in (1, -1):
        turned = [[p and p[::sides] for p in sample] for sample in places]
        with torch.no_grad():
            mixed = truth.attention(*projected, names, turned, turned)
            results.append(out(mixed.transpose(1, 2).flatten(2)))
    assert not torch.allclose(*results, atol=1e-3), "the axes are alike here"
    return results[0]


def seen_by(module, call):
    """What enters and leaves a module while call() runs: first argument, keywords, output."""
    caught = []
    hook = module.register_forward_hook(
        lambda m, args, kwargs, output: caught.append(
            (args[0] if args else kwargs["hidden_states"], kwargs, output)
        ),
        with_kwargs=True,
    )
    with torch.no_grad():
        call()
    hook.remove()
    return caught[0]


def everything(model):
    """All that a module holds: attributes, hooks, submodules, parameters by identity, classes."""
    found = {}
    for name, module in model.named_modules():
        state = {k: v.copy() if isinstance(v, dict) else v for k, v in vars(module).items()}
        grads = [p.requires_grad for p in module.parameters()]
        found[name] = type(module), state, grads
    return found


def outcome(model, x, run):
    """run(model, x), and gradients of x and all parameters; None for those without."""
    x = x.detach().requires_grad_()
    torch.manual_seed(1)  # for a model with dropout
    out = run(model, x)
    inputs = [x, *model.parameters()]
    return [out, *torch.autograd.grad(out.square().sum(), inputs, allow_unused=True)]


def same(found, wanted, **close):
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **close)


def sum_of_passes(model, runs, together=lambda: None):
    """One backward pass of several forward passes gives the sum of the gradients of each.

    ``together()`` is called before the joint pass; it may turn on checkpointing.
    """
    wanted = {}
    for run in runs:
        model.zero_grad()
        run().square().sum().backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                wanted[name] = wanted.get(name, 0) + p.grad
    model.zero_grad()
    together()
    sum(run().square().sum() for run in runs).backward()
    assert any("lookup_table" in name for name in wanted)
    for name, grad in wanted.items():
        mine = model.get_parameter(name).grad
        torch.testing.assert_close(mine, grad, rtol=1e-8, atol=1e-8, msg=name)


class Fixed(nn.Module):
    """A layer whose geometry is a constant of its graph."""

    def __init__(self, layer, geometry):
        super().__init__()
        self.layer, self.geometry = layer, geometry

    def forward(self, x):
        return self.layer(x, self.geometry)


def layer_compiles_exports_and_rounds(layer, x, geometry):
    wanted = layer(x, geometry)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, geometry), wanted, rtol=1e-5, atol=1e-5)
    exported = torch.export.export(Fixed(layer, geometry).eval(), (x,)).module()
    torch.testing.assert_close(exported(x), wanted, rtol=1e-5, atol=1e-5)
    low = layer.to(torch.bfloat16)(x.to(torch.bfloat16), geometry)
    assert (low.float() - wanted).abs().max() < 0.1 * wanted.abs().max() + 0.05


def losses_stay(model, plain, loss):
    """20 training steps of two models give the same losses.

    In float64, since small steps hide an encoding that is left out.
    """
    losses = []
    for one in (model, plain):
        optimizer, own = torch.optim.SGD(one.parameters(), lr=1e-2), []
        torch.manual_seed(1)
        for _ in range(20):
            found = loss(one)
            found.backward()
            optimizer.step()
            optimizer.zero_grad()
            own.append(found.item())
        losses.append(own)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][0] != losses[0][-1]
