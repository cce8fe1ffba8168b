"""Every host family: what works on the model before attach works after it (docs/support.md)."""

import threading

import pytest
import test_attach_torch as torchs
import torch
from families import FAMILIES, inputs
from hosting import QKV, fill
from test_attached import encoder, family, torchvision, transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

import irpe

HOSTS = {
    "torchvision": torchvision,
    "encoder": encoder,
    "transformers": transformers,
    **{name: family(name) for name in FAMILIES},
}


def attached(name):
    model, call = HOSTS[name]()
    where = FAMILIES[name].where if name in FAMILIES else "*"
    with irpe.located(torchs.GRID):
        irpe.attach(model, QKV, where=where)
    fill(model)
    return model.eval(), call


def tensor(out):
    return out if isinstance(out, torch.Tensor) else out[0]


def containers(model):
    return [m for m in model.modules() if isinstance(m, nn.Sequential | nn.ModuleList)]


@pytest.mark.cases(11)
@pytest.mark.parametrize("name", HOSTS)
def test_blocks_and_failed_passes(name):
    model, call = attached(name)
    module = model.get_submodule(list(irpe.specs(model))[-1])

    def look():
        for container in containers(model):
            assert all(a is b for a, b in zip(container, container._modules.values(), strict=True))
            nn.Sequential(*container)

    look()
    wanted = tensor(call(model)).detach()
    look()
    handle = module.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(model)
    handle.remove()
    look()
    assert torch.equal(tensor(call(model)), wanted)


@pytest.mark.cases(7)
@pytest.mark.parametrize("name", HOSTS)
def test_recomputation_in_another_thread(name):
    model, call = attached(name)
    tables = [p for n, p in model.named_parameters() if "lookup" in n]
    wanted = torch.autograd.grad(tensor(call(model)).square().sum(), tables)
    out = checkpoint(lambda: tensor(call(model)), use_reentrant=False)
    call(model)  # another pass in between
    found = []
    thread = threading.Thread(
        target=lambda: found.extend(torch.autograd.grad(out.square().sum(), tables))
    )
    thread.start()
    thread.join()
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_maps(name):
    model, _ = attached(name)
    (images,), options = inputs(FAMILIES[name])
    found = irpe.attention_maps(model, images, **options)
    assert list(found) == list(irpe.specs(model))
    for weights in found.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
