"""Scoring protocols: each token once, with the context that the protocol promises."""

import math
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import refuses
from hypothesis import given, settings
from hypothesis import strategies as st

from training.errors import UserError
from training.text.options import ProtocolConfig
from training.text.protocols import Score, ScoringPlan, score
from training.text.segments import IGNORE


def plan_of(tokens, kind="nonoverlapping", length=8, stride=None, memory=False, **options):
    stream = tokens if isinstance(tokens, np.ndarray) else np.arange(tokens, dtype=np.uint16)
    config = ProtocolConfig(kind=kind, length=length, stride=stride, memory=memory)
    return ScoringPlan(stream, config, **options)


def contexts(plan: ScoringPlan) -> Counter:
    """(target, tokens that the model sees for it) and how often it is scored.

    In a stream that counts, a token says where it stands. With a memory, the model sees all that
    it was given since the row began.
    """
    found = Counter()
    for block in plan:
        for row in range(len(block.tokens)):
            for at in range(block.tokens.shape[1]):
                target = int(block.targets[row, at])
                if target != IGNORE:
                    assert target == block.tokens[row, at] + 1
                    found[target, int(block.positions[row, at]) + 1] += 1
    return found


KINDS = [("nonoverlapping", None), ("token", None)]
KINDS += [("sliding", stride) for stride in (1, 3, 7, 8)]


# --- every token once -----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(10, 90),
    length=st.integers(1, 9),
    stride=st.integers(1, 9),
    batch_size=st.integers(1, 4),
)
def test_every_token_is_scored_once_with_enough_context(tokens, length, stride, batch_size):
    stride = min(stride, length)
    found = contexts(plan_of(tokens, "sliding", length, stride, batch_size=batch_size))
    assert set(found.values()) == {1}
    assert sorted(target for target, _ in found) == list(range(1, tokens))
    for target, context in found:
        if target <= length:
            assert context == target  # the first window: all there is
        else:
            assert length - stride + 1 <= context <= length
    # A loop over windows that start a stride apart.
    expected, begin, scored = set(), 0, 0
    while scored < tokens - 1:
        end = min(begin + length, tokens - 1)
        expected |= {(target, target - begin) for target in range(scored + 1, end + 1)}
        begin, scored = begin + stride, end
    assert set(found) == expected


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(10, 90), length=st.integers(1, 9), batch_size=st.integers(1, 4))
def test_strides_of_a_window_and_of_a_token(tokens, length, batch_size):
    def blocks(kind, stride=None):
        return list(plan_of(tokens, kind, length, stride, batch_size=batch_size))

    for first, second in ((("nonoverlapping",), ("sliding", length)), (("token",), ("sliding", 1))):
        for a, b in zip(blocks(*first), blocks(*second), strict=True):
            for name in ("tokens", "positions", "targets"):
                assert torch.equal(getattr(a, name), getattr(b, name))
    token = contexts(plan_of(tokens, "token", length))
    assert all(context == min(target, length) for target, context in token)


@pytest.mark.parametrize(("kind", "stride"), KINDS)
@pytest.mark.parametrize("memory", [False, True])
def test_parts_of_several_processes_make_the_whole(kind, stride, memory):
    options = {"length": 8, "stride": stride, "memory": memory, "batch_size": 3}
    whole = contexts(plan_of(77, kind, **options))
    parts = [contexts(plan_of(77, kind, **options, shard=n, shards=4)) for n in range(4)]
    assert sum(parts, Counter()) == whole
    assert sum(whole.values()) == 76


# --- how little disjoint windows show -------------------------------------------------------------


@pytest.mark.parametrize(("length", "share"), [(1024, 0.94), (128, 0.50)])
def test_early_tokens(length, share):
    """Shares of predictions with more than 64 tokens to go by (Shortformer, section 2)."""
    found = contexts(plan_of(4 * 1024 + 1, "nonoverlapping", length))
    many = sum(count for (_, context), count in found.items() if context > 64)
    assert round(many / (4 * 1024), 2) == share


# --- a memory -------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(41, 90),
    stride=st.sampled_from([1, 3, 8]),
    rows=st.integers(1, 4),
)
def test_memory_reads_each_token_once_in_order(tokens, stride, rows):
    plan = plan_of(tokens, "sliding", 8, stride, memory=True, batch_size=rows)
    blocks = list(plan)
    assert [block.fresh for block in blocks] == [True] + [False] * (len(blocks) - 1)
    assert blocks[0].tokens.shape == (rows, 8)
    assert {block.tokens.shape[1] for block in blocks[1:-1]} <= {stride}
    read = torch.cat([block.tokens for block in blocks], 1)
    assert (read.diff() == 1).all()
    positions = torch.cat([block.positions for block in blocks], 1)
    assert torch.equal(positions, torch.arange(read.shape[1]).expand(rows, -1))
    targets = torch.cat([block.targets for block in blocks], 1)
    assert sorted(targets[targets != IGNORE].tolist()) == list(range(1, tokens))
    lengths = (targets != IGNORE).sum(1)
    assert lengths.max() - lengths.min() <= 1


class Counting:
    """A model with a memory: its state is the tokens so far, and it checks their order."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def __call__(self, state, tokens, positions):
        seen = tokens if state is None else torch.cat([state, tokens], 1)
        assert (seen.diff() == 1).all()
        assert int(positions[0, -1]) == seen.shape[1] - 1
        # Sure of the next token once two were seen; before that, of none.
        logits = torch.zeros(*tokens.shape, self.vocab)
        sure = positions >= 1
        logits[sure] = 50.0 * F.one_hot(tokens[sure] + 1, self.vocab)
        return logits, seen


@pytest.mark.parametrize("rows", [1, 3])
def test_state_is_handed_from_block_to_block(rows):
    model = Counting(100)
    plan = plan_of(90, "token", 8, memory=True, batch_size=rows)
    result = score(model, plan, np.ones(100, dtype=np.int64))
    assert result.tokens == 89
    # Only the first token of each row has nothing before it.
    assert result.nats == pytest.approx(rows * math.log(100), rel=1e-6)


def test_state_is_dropped_between_windows():
    states = []

    def model(state, tokens, positions):
        states.append(state)
        return torch.zeros(*tokens.shape, 100), "kept"

    score(model, plan_of(50), np.ones(100))
    assert states == [None] * 7
    states.clear()
    score(model, plan_of(50, memory=True), np.ones(100))
    assert states == [None] + ["kept"] * 6


# --- the score ------------------------------------------------------------------------------------


class Bigrams:
    """Probabilities of a token after another, without any state."""

    def __init__(self, vocab: int, dtype=torch.float64) -> None:
        self.table = torch.randn(vocab, vocab, dtype=dtype)

    def __call__(self, state, tokens, positions):
        return self.table[tokens], None


@pytest.mark.parametrize(("kind", "stride"), KINDS)
@pytest.mark.parametrize("memory", [False, True])
def test_score_against_a_loop(kind, stride, memory):
    """A model without context scores the same under every protocol."""
    generator = np.random.default_rng(0)
    stream, counts = generator.integers(0, 20, 75), generator.integers(1, 5, 20)
    model = Bigrams(20)
    nats = size = 0
    for before, token in zip(stream.tolist(), stream.tolist()[1:], strict=False):
        nats -= float(model.table[before].log_softmax(-1)[token])
        size += int(counts[token])
    plan = plan_of(stream, kind, 8, stride, memory, batch_size=2)
    result = score(model, plan, counts)
    assert result.nats == pytest.approx(nats, rel=1e-12)
    assert (result.tokens, result.bytes) == (74, size)
    assert result.nats_per_token == pytest.approx(nats / 74)
    assert result.bits_per_byte == pytest.approx(nats / size / math.log(2))
    assert result.perplexity == pytest.approx(math.exp(nats / 74))
    # Log-probabilities serve as well as logits.
    ready = score(lambda s, t, p: (model.table[t].log_softmax(-1), None), plan, counts)
    assert ready.nats == pytest.approx(nats, rel=1e-12)


def test_low_precision_is_summed_in_float32():
    model = Bigrams(20, torch.bfloat16)
    stream = np.random.default_rng(0).integers(0, 20, 75)
    exact = Bigrams(20)
    exact.table = model.table.double()
    counts = np.ones(20)
    low, high = (score(each, plan_of(stream), counts).nats for each in (model, exact))
    assert low == pytest.approx(high, rel=1e-6)


def test_every_figure_names_its_protocol():
    labels = [
        (("nonoverlapping",), "non-overlapping, window 8"),
        (("sliding", 8, 3), "sliding window, stride 3, window 8"),
        (("token",), "token by token, window 8"),
        (("token", 8, None, True), "token by token, window 8, memory"),
    ]
    for arguments, label in labels:
        plan = plan_of(30, *arguments)
        assert plan.label == label
        result = score(Bigrams(30), plan, np.ones(30))
        assert result.protocol == result.record()["protocol"] == label
        assert set(result.record()) == {
            "protocol", "nats_per_token", "bits_per_byte", "perplexity", "tokens",
        }  # fmt: skip
    striped = plan_of(30, memory=True, batch_size=2)
    assert striped.label == "non-overlapping, window 8, memory, 2 stripes"
    assert math.isnan(Score("none", 0.0, 0, 0).bits_per_byte)
    assert Score("bad", 1e9, 1, 1).perplexity < math.inf


# --- bad input ------------------------------------------------------------------------------------


def test_bad_protocols():
    cases = [
        ((50, "sliding"), {}, ["protocol.stride: None", "from 1 to 8"]),
        ((50, "sliding", 8, 0), {}, ["protocol.stride: 0"]),
        ((50, "sliding", 8, 9), {}, ["protocol.stride: 9", "from 1 to 8"]),
        ((50, "token", 8, 2), {}, ["protocol.stride: 2", "not token"]),
        ((50, "nonoverlapping", None), {}, ["protocol.length: None"]),
        ((50, "nonoverlapping", -3), {}, ["protocol.length: -3"]),
        ((8, "nonoverlapping", 8), {}, ["8 tokens", "window of 8", "token after"]),
        ((50, "token", 8), {"memory": True, "batch_size": 7}, ["7 stripes", "window of 8"]),
    ]
    for arguments, options, parts in cases:
        refuses(partial(plan_of, *arguments, **options), *parts, error=UserError)
    assert sum(contexts(plan_of(9, length=8)).values()) == 8
    # The length of training where the protocol has none of its own.
    assert ScoringPlan(np.arange(50), ProtocolConfig(), length=16).length == 16
