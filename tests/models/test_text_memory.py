"""Memories: blocks against tokens one by one, position-infused attention against loops."""

import pytest
import torch
from models_text import F64, IN_ATTENTION, V, model, tokens
from oracles import shortformer
from torch.testing import assert_close

import irpe
from models.text import Cache, generate
from training.text.options import ProtocolConfig
from training.text.protocols import ScoringPlan, score


def read(lm, x, block, sizes, size=None, state=None):
    """Logits of a text read in pieces of some sizes, and the memory after it."""
    state, found = state or lm.memory(block, size), []
    for piece in x.split(sizes, 1):
        logits, state = lm(piece, state=state)
        found.append(logits)
    return torch.cat(found, 1), state


def random_weights(lm):
    for name, parameter in lm.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return lm


@pytest.mark.parametrize("spec", ["pia", "pia,form=paper"])
@pytest.mark.parametrize(("block", "size"), [(4, 4), (4, 2), (3, 7), (5, 0), (20, 20)])
def test_shortformer_against_loops(spec, block, size):
    """Logits and gradients, through blocks whose memories pass none on."""
    lm, x = random_weights(model(spec)), tokens(batch=2, length=11)
    form = "paper" if "paper" in spec else "fairseq"
    found, _ = read(lm, x, block, block, size)
    weights = dict(lm.named_parameters())
    truth = torch.stack(
        [shortformer.logits(weights, row, 2, block, size, form) for row in x.tolist()]
    )
    assert_close(found, truth, rtol=1e-10, atol=1e-11)
    w = torch.randn_like(truth)
    inputs = list(lm.parameters())
    grads = torch.autograd.grad((found * w).sum(), inputs)
    wanted = torch.autograd.grad((truth * w).sum(), inputs)
    for mine, other in zip(grads, wanted, strict=True):
        assert other.abs().max() > 1e-6
        assert_close(mine, other, rtol=1e-9, atol=1e-10)


@pytest.mark.cases(5)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("block", "size"), [(4, None), (3, 7), (5, 0)])
@pytest.mark.parametrize("spec", IN_ATTENTION)
def test_pieces_do_not_matter(spec, block, size, grad):
    """Block by block, token by token, or in pieces of any size: the same."""
    lm, x = model(spec), tokens(batch=2, length=18)
    with torch.set_grad_enabled(grad):
        blocks, state = read(lm, x, block, block, size)
        for sizes in (1, 18, [3, 1, 9, 5]):
            found, other = read(lm, x, block, sizes, size)
            assert_close(found, blocks, rtol=1e-10, atol=1e-11)
            assert other.fresh == state.fresh
            for a, b in zip(other.layers, state.layers, strict=True):
                for one, two in zip(a, b, strict=True):
                    assert (one is None) == (two is None)
                    if one is not None:
                        assert_close(one, two, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("spec", IN_ATTENTION)
def test_first_block_is_a_plain_one(spec):
    lm, x = model(spec), tokens(length=8)
    assert_close(read(lm, x, 8, 8)[0], lm(x), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("spec", IN_ATTENTION)
def test_a_memory_is_no_recomputation(spec):
    """One block deep, what is remembered is what a window twice as long holds; deeper, not."""
    x = tokens(length=24)
    for depth in (1, 2):
        lm = model(spec, depth=depth)
        found, _ = read(lm, x, 8, 8)
        window = lm(x[:, 8:24])[:, 8:]
        off = (found[:, 16:] - window).abs().max()
        assert off < 1e-9 if depth == 1 else off > 1e-3


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("spec", ["pia", "rope"])
def test_length_of_a_memory(spec, grad):
    lm, x = model(spec), tokens(length=23)
    with torch.set_grad_enabled(grad):
        _, state = read(lm, x, 5, 1, 3)
        assert (state.fresh, state.positions.shape[-1]) == (3, 3 + 3)
        state = lm.memory(5, 3)
        for begin in range(0, 20, 5):
            _, state = lm(x[:, begin : begin + 5], state=state)
            first = 0 if spec == "pia" else begin + 2
            assert state.positions.tolist() == [first, first + 1, first + 2]
            shapes = [(3, 3, 16)] if grad else [(3, 2, 3, 8)] * 2
            if spec == "pia" and not grad:
                shapes.append((1, 2, 3, 8))
            for kept in state.layers:
                there = [part for part in kept if part is not None]
                assert [tuple(part.shape) for part in there] == shapes
                assert not any(part.requires_grad for part in there)


@pytest.mark.parametrize("spec", IN_ATTENTION)
def test_memories_with_and_without_gradients_agree(spec):
    """A memory of one kind continues as the other kind."""
    lm, x = model(spec), tokens(length=24)
    truth, _ = read(lm, x, 8, 8)
    for switches in ((True, False, False), (False, True, True), (False, True, False)):
        state, found = lm.memory(8), []
        for number, grad in enumerate(switches):
            with torch.set_grad_enabled(grad):
                logits, state = lm(x[:, 8 * number : 8 * number + 8], state=state)
            found.append(logits)
        assert_close(torch.cat(found, 1), truth, rtol=1e-10, atol=1e-11)


def test_attention_is_a_block_by_a_block_and_its_memory(monkeypatch):
    shapes, real = [], irpe.attention

    def attention(q, k, v, *given, **options):
        shapes.append((q.shape[-2], k.shape[-2]))
        return real(q, k, v, *given, **options)

    monkeypatch.setattr(irpe, "attention", attention)
    read(model("pia", depth=1), tokens(length=24), 8, 8)
    assert shapes == [(8, 8), (8, 16), (8, 16)]


def test_values_carry_no_positions():
    """Where every key counts alike, their order does not; with positions at the input it does."""
    x = tokens(batch=1, length=9)
    mixed = x[:, [3, 1, 5, 0, 7, 2, 6, 4, 8]]
    for spec, same in (("pia", True), ("sinusoidal", False)):
        lm = model(spec, depth=1)
        with torch.no_grad():
            attn = lm.body.blocks[0].attn
            attn.qkv.weight[:16] = 0
            attn.qkv.bias[:16] = 0
        off = (lm(x)[:, -1] - lm(mixed)[:, -1]).abs().max()
        assert off < 1e-12 if same else off > 1e-3


@pytest.mark.parametrize("spec", IN_ATTENTION)
def test_no_later_token_is_seen_across_blocks(spec):
    lm, x = model(spec), tokens(length=24)
    before, _ = read(lm, x, 8, 8)
    changed = x.clone()
    changed[:, 10] = (x[:, 10] + 1) % V
    after, _ = read(lm, changed, 8, 8)
    assert torch.equal(before[:, :10], after[:, :10])
    assert (before[:, 10:] - after[:, 10:]).abs().amax(-1).min() > 1e-9


# --- scoring --------------------------------------------------------------------------------------


def plain_score(logits, targets):
    return float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))


def test_scoring_with_a_memory():
    """Block by block and token by token give the same sum, which is that of a plain loop."""
    lm, stream = model("pia"), tokens(batch=1, length=61)[0]
    counts = torch.ones(V, dtype=torch.int64).numpy()
    truth, state = 0.0, lm.memory(8)
    with torch.no_grad():
        for begin in range(0, 60, 8):
            piece = stream[begin : min(begin + 8, 60)][None]
            logits, state = lm(piece, state=state)
            truth += plain_score(logits[0], stream[begin + 1 : begin + 1 + piece.shape[1]])
    for kind, stride in (("nonoverlapping", None), ("sliding", 3), ("token", None)):
        config = ProtocolConfig(kind=kind, length=8, stride=stride, memory=True)
        found = score(lm.reader(8), ScoringPlan(stream.numpy(), config), counts)
        assert found.nats == pytest.approx(truth, rel=1e-6)
        assert found.tokens == 60


@pytest.mark.parametrize("spec", ["rope", "learned,length=64", "pia", "t5,buckets=8,max=20"])
def test_scoring_without_one(spec):
    lm, stream = model(spec), tokens(batch=1, length=41)[0]
    config = ProtocolConfig(kind="sliding", length=8, stride=3)
    plan = ScoringPlan(stream.numpy(), config, batch_size=4)
    found = score(lm.reader(), plan, torch.ones(V, dtype=torch.int64).numpy())
    truth, begin, done = 0.0, 0, 0
    with torch.no_grad():
        while done < 40:
            end = min(begin + 8, 40)
            logits = lm(stream[None, begin:end])[0, done - begin :]
            truth += plain_score(logits, stream[done + 1 : end + 1])
            begin, done = begin + 3, end
    assert found.nats == pytest.approx(truth, rel=1e-6)


def test_generation_past_the_memory():
    lm, x = model("pia"), tokens(batch=2, length=13)
    text = generate(lm, x, 10, temperature=0, state=lm.memory(4))
    whole = torch.cat((x, text), 1)
    logits, _ = read(lm, whole, 4, 4)
    assert torch.equal(logits[:, 12:-1].argmax(-1), text)


def test_half_precision_and_caches():
    """A memory of another type is what autocast made of it."""
    lm, x = model("pia").float(), tokens(length=16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, state = read(lm, x, 8, 8)
        token, _ = read(lm, x, 8, 1)
    assert state.layers[0].k.dtype == torch.bfloat16 and state.layers[0].inputs is None
    plain, _ = read(lm, x, 8, 8)
    for y in (found, token):
        assert (y.float() - plain).abs().mean() < 0.05 * plain.abs().mean()
    assert lm(x, state=Cache())[0].dtype == torch.float32 and plain.dtype != F64
