"""Staged plans: which windows each step reads, in every stage, process and order."""

from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from common import refuses
from hypothesis import given, settings
from hypothesis import strategies as st

from training.errors import UserError
from training.lm.options import LmConfig
from training.text.options import SegmentConfig, StageConfig
from training.text.segments import windows
from training.text.staged import TextPlan

NAMES = ("input_ids", "position_ids", "labels", "segment_ids")


def stages(*pairs) -> list[StageConfig]:
    return [StageConfig(length=length, until=until) for length, until in pairs]


def plan_of(tokens=1000, budget=48, steps=100, lengths=((4, 0.3), (8, 60), (24, None)), **options):
    given = {"budget": budget, "steps_per_epoch": steps, "stages": stages(*lengths), **options}
    return TextPlan(tokens, LmConfig(epochs=1, **{k: x for k, x in given.items() if x is not None}))


def stream_of(tokens: int) -> np.ndarray:
    return np.arange(tokens, dtype=np.uint16)


def same(first, second) -> bool:
    return first.reset == second.reset and all(
        torch.equal(getattr(first, name), getattr(second, name)) for name in NAMES
    )


def batches(plan: TextPlan, stream: np.ndarray, first: int = 0):
    return (plan.batch(stream, step) for step in range(first, plan.steps))


# --- windows --------------------------------------------------------------------------------------


def test_windows_against_a_loop():
    stream = np.array([5, 3, 9, 1, 7, 7, 2], dtype=np.uint8)
    batch = windows(stream, np.array([4, 0, 3]), 3)
    for row, start in enumerate([4, 0, 3]):
        for at in range(3):
            after = start + at + 1
            assert batch.input_ids[row, at] == int(stream[start + at])
            assert batch.labels[row, at] == (int(stream[after]) if after < 7 else -100)
            assert batch.position_ids[row, at] == at
            assert batch.segment_ids[row, at] == 0
    assert all(getattr(batch, name).dtype == torch.int64 for name in NAMES)
    assert batch.to("cpu").reset
    with pytest.raises(IndexError):
        windows(stream, np.array([5]), 3)


# --- the budget, the text, the switch -------------------------------------------------------------


@pytest.mark.parametrize("order", ["shuffled", "stripes"])
@settings(max_examples=30, deadline=None)
@given(
    base=st.integers(1, 6),
    factors=st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=3, unique=True),
    tokens=st.integers(80, 700),
    seed=st.integers(0, 9),
)
def test_every_turn_of_every_stage_reads_the_same_tokens(order, base, factors, tokens, seed):
    budget = 12 * base
    per_turn = (tokens - 1) // budget
    steps = per_turn * len(factors) * 2
    ends = [2 * per_turn * (number + 1) for number in range(len(factors))]
    lengths = [(base * factor, end) for factor, end in zip(sorted(factors), ends, strict=True)]
    plan = plan_of(tokens, budget, steps, lengths, order=order, seed=seed)
    stream = stream_of(tokens)
    expected = sorted(range(per_turn * budget))
    before = 0
    for turn in range(steps // per_turn):
        read, labels = [], []
        for step in range(turn * per_turn, (turn + 1) * per_turn):
            rows, batch = plan.at(step), plan.batch(stream, step)
            assert batch.input_ids.numel() == budget
            assert batch.input_ids.shape == (budget // rows.length, rows.length)
            assert before <= rows.stage <= before + 1
            before = rows.stage
            assert rows.turn == turn % 2
            read += batch.input_ids.flatten().tolist()
            labels += batch.labels.flatten().tolist()
        assert sorted(read) == expected  # each once
        assert labels == [token + 1 for token in read]
    assert before == len(factors) - 1


def test_switch_at_shares_and_steps():
    plan = plan_of()
    assert plan.ends == (30, 60, 100)
    found = [plan.at(step).stage for step in range(100)]
    assert found == [0] * 30 + [1] * 30 + [2] * 40
    assert [plan.at(step).length for step in (29, 30, 59, 60)] == [4, 8, 8, 24]
    assert [plan.batch_size(stage) for stage in range(3)] == [12, 6, 2]


def test_a_new_stage_starts_a_new_turn():
    """A switch in the middle of a turn: the next stage goes through the text from its beginning."""
    plan = plan_of(tokens=10 * 48 + 1, steps=30, lengths=((4, 7), (8, None)), order="stripes")
    assert [plan.at(step).turn for step in (0, 6, 7, 16, 17)] == [0, 0, 0, 0, 1]
    assert [step for step in range(30) if plan.at(step).reset] == [0, 7, 17, 27]


def test_order_depends_on_seed_stage_and_turn():
    plan = plan_of(tokens=10 * 48 + 1, steps=40, lengths=((8, 0.5), (8, None)))

    def order(plan: TextPlan, first: int) -> list[int]:
        return np.concatenate([plan.at(step).starts for step in range(first, first + 10)]).tolist()

    orders = [order(plan, first) for first in (0, 10, 20, 30)]
    other = plan_of(tokens=10 * 48 + 1, steps=40, lengths=((8, 0.5), (8, None)), seed=1)
    orders.append(order(other, 0))
    assert len({tuple(found) for found in orders}) == 5
    assert all(sorted(found) == list(range(0, 480, 8)) for found in orders)
    assert orders[0] != sorted(orders[0])


@pytest.mark.parametrize("order", ["shuffled", "stripes"])
def test_resume_in_mid_stage(order):
    stream = stream_of(1000)
    whole = list(batches(plan_of(order=order, seed=4), stream))
    for first in (17, 30, 77):
        resumed = batches(plan_of(order=order, seed=4), stream, first)
        assert all(same(a, b) for a, b in zip(whole[first:], resumed, strict=True))


# --- stripes --------------------------------------------------------------------------------------


def test_stripes_continue_row_by_row():
    plan, stream = plan_of(order="stripes"), stream_of(1000)
    before, continued = None, 0
    for batch in batches(plan, stream):
        if not batch.reset:
            assert torch.equal(batch.input_ids[:, 0], before.labels[:, -1])
            assert torch.equal(batch.input_ids[:, 0], before.input_ids[:, -1] + 1)
            continued += 1
        before = batch
    assert continued == 100 - 6  # 20 steps a turn: at 0, 20, 30, 50, 60, 80


def test_shuffled_batches_forget():
    assert all(batch.reset for batch in batches(plan_of(), stream_of(1000)))


# --- processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("segments", [None, SegmentConfig(method="chunk", long_length=48)], ids=str)
@pytest.mark.parametrize("order", ["shuffled", "stripes"])
def test_processes_read_disjoint_parts_of_one_batch(order, segments):
    if segments is not None and order == "stripes":
        return
    plan = plan_of(lengths=((4, 0.3), (8, 60), (24, None)), order=order, segments=segments)
    stream = stream_of(1000)
    for step in range(100):
        whole = plan.batch(stream, step)
        halves = [plan.batch(stream, step, shard, 2) for shard in range(2)]
        for name in NAMES:
            joined = torch.cat([getattr(half, name) for half in halves])
            assert torch.equal(joined, getattr(whole, name)), name
        assert not set(halves[0].input_ids.flatten().tolist()) & set(
            halves[1].input_ids.flatten().tolist()
        )


def test_each_process_keeps_its_stripes():
    plan, stream = plan_of(lengths=((8, None),), order="stripes"), stream_of(1000)
    for shard in range(3):
        batches = [plan.batch(stream, step, shard, 3) for step in range(20)]
        for row in range(2):
            text = torch.cat([batch.input_ids[row] for batch in batches])
            assert torch.equal(text, torch.arange(int(text[0]), int(text[0]) + 160))
            assert text[0] == 160 * (2 * shard + row)


# --- segments of longer texts ---------------------------------------------------------------------


def test_segments_come_from_disjoint_long_texts():
    config = SegmentConfig(method="chunk", long_length=32)
    plan = plan_of(tokens=1000, budget=48, steps=12, lengths=((16, None),), segments=config)
    assert plan.steps_per_turn(0) == 999 // 96 == 10
    counts = Counter()
    for step in range(10):
        rows, batch = plan.at(step), plan.batch(stream_of(1000), step)
        assert batch.input_ids.shape == (3, 16)
        assert rows.span == 32
        assert torch.equal(batch.input_ids - batch.position_ids,
                           torch.from_numpy(rows.starts)[:, None].expand(3, 16))  # fmt: skip
        counts.update(rows.starts.tolist())
    assert counts == Counter(range(0, 960, 32))
    # The next turn draws other segments of the same texts.
    first = {}
    for step in range(10):
        rows = plan.batch(stream_of(1000), step).position_ids.tolist()
        first.update(zip(plan.at(step).starts, rows, strict=True))
    again = plan.batch(stream_of(1000), 10)
    for start, row in zip(plan.at(10).starts, again.position_ids, strict=True):
        assert row.tolist() != first[start]


def test_full_takes_long_windows_at_the_same_budget():
    config = SegmentConfig(method="full", long_length=24)
    plan = plan_of(lengths=((8, None),), segments=config)
    plain = plan_of(lengths=((24, None),))
    stream = stream_of(1000)
    assert all(same(plan.batch(stream, step), plain.batch(stream, step)) for step in range(40))


# --- bad input ------------------------------------------------------------------------------------


def test_bad_plans():
    cases = [
        ({"lengths": ((7, None),)}, ["length of 7", "budget of 48"]),
        ({"lengths": ((0, None),)}, ["length of 0"]),
        ({"lengths": ((96, None),)}, ["length of 96", "budget of 48"]),
        ({"lengths": ((4, 0.5), (8, 0.5), (8, None))}, ["50, 50, 100"]),
        ({"lengths": ((4, 50), (8, 80))}, ["50, 80 of 100", "until: null"]),
        ({"lengths": ((4, None), (8, None))}, ["100, 100"]),
        ({"lengths": ((4, 0), (8, None))}, ["0, 100"]),
        ({"lengths": ((4, -3.0), (8, None))}, ["stages"]),
        ({"lengths": ((4, 2.5), (8, None))}, ["2.5", "whole step"]),
        ({"tokens": 24}, ["24 tokens", "window of 24", "token after"]),
        ({"tokens": 48}, ["48 tokens", "step of 48", "smaller budget"]),
        ({"order": "stripes", "segments": SegmentConfig(method="full", long_length=48)},
         ["full", "stripes"]),
        ({"lengths": ((8, None),), "segments": SegmentConfig(method="chunk")}, ["long_length"]),
        ({"lengths": ((8, None),), "tokens": 90,
          "segments": SegmentConfig(method="chunk", long_length=96)}, ["window of 96"]),
        ({"lengths": ((8, None),), "segments": SegmentConfig(method="full", long_length=32)},
         ["length of 32", "budget of 48"]),
    ]  # fmt: skip
    for options, parts in cases:
        refuses(partial(plan_of, **options), *parts, error=UserError)
    assert plan_of(tokens=49, lengths=((4, None),)).steps_per_turn(0) == 1
    with pytest.raises(UserError, match="6 windows of 8.*4 processes"):
        plan_of().check_shards(4)
    with pytest.raises(UserError, match="do not divide into 5"):
        plan_of().batch(stream_of(1000), 0, 0, 5)
