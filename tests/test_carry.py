"""How a geometry reaches the attention modules: blocks stay themselves, nothing is left behind."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import timm
import torch
from hosting import fill
from timm.models._manipulate import checkpoint_seq
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import irpe

SPEC = "rpe-1.9-product-ctx-1-qk"
SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3, "dynamic_img_size": True}
# 4x9 and 6x6: 36 patches both
WIDE, SQUARE = torch.randn(2, 3, 64, 144), torch.randn(2, 3, 96, 96)


def vit(**options):
    torch.manual_seed(0)
    options = {"img_size": (64, 144), **SMALL, **options}
    model = timm.create_model("vit_tiny_patch16_224", **options)
    irpe.attach(model, SPEC)
    for block in model.blocks:  # as started, attention hardly reaches the output
        nn.init.normal_(block.attn.qkv.weight, std=0.5)
        nn.init.normal_(block.attn.proj.weight, std=0.5)
    return fill(model)


def in_thread(function):
    errors = []

    def run():
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def take_gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def check_sum(model, losses, found):
    """``found`` are the gradients of separate passes, added up."""
    wanted = {}
    for loss in losses:
        loss().backward()
        for name, grad in take_gradients(model).items():
            wanted[name] = wanted.get(name, 0) + grad
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5, msg=name)


def tokens(model, x):
    x = model.patch_drop(model._pos_embed(model.patch_embed(x)))
    return model.norm_pre(x)


def block_by_block(model, x, reentrant):
    x = tokens(model, x)
    for block in model.blocks:
        x = checkpoint(block, x, use_reentrant=reentrant)
    return x


def attention_only(model, x, reentrant):
    x = tokens(model, x)
    for block in model.blocks:
        x = x + checkpoint(lambda y, b=block: b.attn(b.norm1(y)), x, use_reentrant=reentrant)
    return x


def embedding_only(model, x, reentrant):
    stem = checkpoint(lambda y: tokens(model, y), x.requires_grad_(), use_reentrant=reentrant)
    return model.blocks(stem)


def nested(model, x, reentrant):
    inner = lambda y: checkpoint_seq(model.blocks, y, use_reentrant=reentrant)  # noqa: E731
    return checkpoint(inner, tokens(model, x), use_reentrant=reentrant)


WAYS = {
    "plain": lambda m, x, r: m(x),
    "forward_features": lambda m, x, r: m.forward_features(x),
    "forward_intermediates": lambda m, x, r: m.forward_intermediates(x)[0],
    "set_grad_checkpointing": lambda m, x, r: (m.set_grad_checkpointing(), m(x))[1],
    "checkpoint_seq": lambda m, x, r: checkpoint_seq(
        m.blocks, tokens(m, x), every=2, use_reentrant=r
    ),
    "checkpoint_sequential": lambda m, x, r: checkpoint_sequential(
        m.blocks, 2, tokens(m, x), use_reentrant=r
    ),
    "whole model": lambda m, x, r: checkpoint(m, x.clone().requires_grad_(), use_reentrant=r),
    "block by block": block_by_block,
    "attention only": attention_only,
    "embedding only": embedding_only,
    "nested": nested,
}


@pytest.mark.cases(3)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_two_grids_before_one_backward(way, reentrant):
    """Gradients of separate passes: in another thread, patches dropped, a third grid between."""
    model = vit(patch_drop_rate=0.25)

    def loss(x, seed):
        torch.manual_seed(seed)
        out = WAYS[way](model, x.clone(), reentrant)
        return (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()

    for run in (lambda function: function(), in_thread):
        total = loss(WIDE, 1) + loss(SQUARE, 2)
        model.eval()(torch.randn(1, 3, 32, 32))
        model.train()
        run(total.backward)
        found = take_gradients(model)
        check_sum(model, (lambda: loss(WIDE, 1), lambda: loss(SQUARE, 2)), found)


def failed(model):
    hook = model.norm_pre.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(WIDE)
    hook.remove()


BEFORE = {
    "nothing": lambda m: None,
    "patch_embed": lambda m: m.patch_embed(WIDE),
    "a failed pass": failed,
    "forward_features": lambda m: m.forward_features(WIDE),
}


@pytest.mark.parametrize("before", BEFORE)
def test_blocks_are_themselves(before):
    model = vit().eval()
    wanted = model(SQUARE)
    BEFORE[before](model)
    assert type(model.blocks) is nn.Sequential
    assert all(a is b for a, b in zip(model.blocks, model.blocks._modules.values(), strict=True))
    nn.Sequential(*model.blocks)
    assert torch.equal(model(SQUARE), wanted)


@pytest.mark.parametrize("before", [failed, lambda m: m(WIDE)])
def test_nothing_is_left_after_a_pass(before):
    model = vit().eval()
    before(model)
    with pytest.raises(irpe.IrpeError, match="no grid"):
        model.blocks[0](torch.randn(1, 37, 16))
    out = tokens(model, SQUARE)
    for block in model.blocks:
        out = block(out)
    assert torch.equal(model.norm(out), model.forward_features(SQUARE))


class Masked(nn.Module):
    """Blocks of timm's in a model of one's own, as an MAE encoder has them."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.blocks = nn.ModuleList(Block(16, 2) for _ in range(2))
        self.reentrant = reentrant

    def forward(self, x, geometry):
        with irpe.located(geometry):
            for block in self.blocks:
                if self.reentrant is None:
                    x = block(x)
                else:
                    x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("prefix", [0, 2])
def test_blocks_in_a_model_of_ones_own(prefix):
    """The same tokens on a whole grid and as kept patches; the prefix from ``located``."""
    torch.manual_seed(0)
    model = Masked()
    grid = irpe.Grid(4, 9, prefix=prefix)
    kept = torch.stack([torch.randperm(64)[:36] for _ in range(2)])
    geometries = (grid, irpe.Grid(8, 8, prefix=prefix).select(kept))
    with irpe.located(grid):
        irpe.attach(model, SPEC)
    fill(model)
    x = torch.randn(2, 36 + prefix, 16, requires_grad=True)
    one = irpe.Grid(8, 8, prefix=prefix, positions=geometries[1].positions(x.device)[0][1])
    wanted = model(x[1:], one)
    torch.testing.assert_close(model(x, geometries[1])[1:], wanted)
    for model.reentrant in (None, False, True):
        for run in (lambda function: function(), in_thread):
            losses = [lambda g=g: model(x, g).square().sum() for g in geometries]
            total = losses[0]() + losses[1]()
            with irpe.located(irpe.Grid(6, 6, prefix=prefix)):
                run(total.backward)
            check_sum(model, losses, take_gradients(model))


def test_the_latest_statement_wins_and_the_earlier_one_returns():
    model = vit().eval()
    x = tokens(model, WIDE)
    wanted = model.forward_features(WIDE)
    square = irpe.Grid(6, 6, prefix=1)
    with irpe.located(square):
        other = model.blocks(x)
        tokens(model, WIDE)
        torch.testing.assert_close(model.norm(model.blocks(x)), wanted)  # the patch embedding's
        with irpe.located(square):
            assert torch.equal(model.blocks(x), other)
    assert not torch.allclose(model.norm(other), wanted, atol=1e-2)
    torch.testing.assert_close(model.norm(model.blocks(x)), wanted)


def test_copies_have_a_slot_of_their_own():
    model = vit(patch_drop_rate=0.3).eval()
    model.patch_embed(WIDE)
    wanted = model(SQUARE)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(SQUARE), wanted)
        first, second = (tokens(m, x) for m, x in ((model, WIDE), (other, SQUARE)))
        for mine, its in zip(model.blocks, other.blocks, strict=True):
            first, second = mine(first), its(second)
        assert torch.equal(other.norm(second), other.forward_features(SQUARE))
        irpe.detach(other)
        assert torch.equal(model(SQUARE), wanted)


def test_threads_and_replicas():
    model = vit().eval()
    wanted, found = [model(WIDE), model(SQUARE)], [None, None]

    def run(index, x):
        for _ in range(10):
            found[index] = model(x)

    threads = [threading.Thread(target=run, args=each) for each in enumerate((WIDE, SQUARE))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, found, wanted))
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    irpe.attach(attention, SPEC)
    replica = attention._replicate_for_data_parallel()  # as nn.DataParallel makes it
    replica._parameters, replica._modules = attention._parameters, attention._modules
    x = torch.randn(2, 12, 16)
    with irpe.located(irpe.Grid(3, 4)):
        in_thread(lambda: replica(x, x, x))
        with pytest.raises(irpe.IrpeError, match="no grid"):
            in_thread(lambda: attention(x, x, x))


class OtherCheckpoint(torch.autograd.Function):
    """Recomputes without torch.utils.checkpoint."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.function(x)
        torch.autograd.backward(out, grad)
        return None, x.grad


def test_another_checkpoint_is_refused():
    model = vit()
    out = OtherCheckpoint.apply(model.blocks, tokens(model, WIDE))
    tokens(model, SQUARE)
    with pytest.raises(irpe.IrpeError, match=r"other than torch\.utils\.checkpoint recomputes"):
        out.sum().backward()


def test_no_reference_stays():
    model = vit()
    model.set_grad_checkpointing()
    model(WIDE).sum().backward()
    slot = weakref.ref(model.blocks[0].attn.rpe_slot)
    del model
    gc.collect()
    assert slot() is None


def test_missing_names_of_torch_are_said(monkeypatch):
    import importlib

    import torch.utils.checkpoint as module

    monkeypatch.delattr(module, "_CheckpointFrame")
    spec = importlib.util.find_spec("irpe.hosts.carry")
    with pytest.raises(irpe.IrpeError, match=r"no torch\.utils\.checkpoint\._CheckpointFrame"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def counting():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    return backend, graphs


def test_one_graph_whatever_runs_in_between():
    model = vit(depth=1).eval()
    torch._dynamo.reset()
    backend, graphs = counting()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    wanted = model(WIDE)
    for between in (model, model.patch_embed, model.forward_features):
        torch.testing.assert_close(compiled(WIDE), wanted, rtol=1e-4, atol=1e-5)
        between(SQUARE)
    with irpe.located(irpe.Grid(3, 4)):
        torch.testing.assert_close(compiled(WIDE), wanted, rtol=1e-4, atol=1e-5)
    assert len(graphs) <= 2


@torch.no_grad()
def test_compiled_blocks_follow_every_change_of_the_geometry():
    """Compiled blocks equal eager ones where ``located`` and embeddings alternate."""
    model, eager = vit(depth=1).eval(), vit(depth=1).eval()
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    first, second = irpe.Grid(9, 4, prefix=1), irpe.Grid(3, 12, prefix=1)

    def outputs(m):
        with irpe.located(first):
            x = tokens(m, WIDE)
            yield m.blocks(x)
            with irpe.located(second):
                yield m.blocks(x)
            yield m.blocks(x)
        x = tokens(m, SQUARE)
        yield m.blocks(x)
        with irpe.located(second):
            yield m.blocks(x)
            yield m.blocks(tokens(m, WIDE))
        yield m.blocks(x)

    for _ in range(2):
        pairs = zip(list(outputs(model)), list(outputs(eager)), strict=True)
        for number, (found, wanted) in enumerate(pairs):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=f"{number}")


class Break(nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return x


@pytest.mark.full
@torch.no_grad()
def test_a_graph_break_between_embedding_and_blocks():
    model = vit(depth=1).eval()
    model.norm_pre = Break()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    found = [None, None]

    def run():
        found[:] = compiled(WIDE), compiled(SQUARE)

    for call in (lambda function: function(), in_thread):
        call(run)
        for mine, x in zip(found, (WIDE, SQUARE), strict=True):
            torch.testing.assert_close(mine, model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_embedding_inside_a_traced_statement_leaves_nothing():
    model = vit(depth=1).eval()
    torch._dynamo.reset()
    first, second = irpe.Grid(9, 4, prefix=1), irpe.Grid(3, 12, prefix=1)

    def embed(x):
        with irpe.located(first):
            return tokens(model, x)

    def run(x):
        with irpe.located(second):
            return model.blocks(x)

    x = torch.compile(embed, backend="eager", fullgraph=True)(WIDE)
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), run(x), rtol=1e-4, atol=1e-5)
    with irpe.located(first):
        assert not torch.allclose(run(x), model.blocks(x), atol=1e-2)
