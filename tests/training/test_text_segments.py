"""Windows made of segments: where their tokens come from, and which labels and positions they get.

A token of the stream says where it stands, so that what a row was made of can be read off it.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.errors import UserError
from training.text.options import SegmentConfig
from training.text.segments import IGNORE, long_length, pick, segment_batch, window_length, windows

STREAM = np.arange(1000, dtype=np.uint16) + 1
VARIANTS = [
    {"method": "chunk"},
    {"method": "chunk", "placement": "grid"},
    {"method": "chunk", "content": "skip"},
    {"method": "chunk", "placement": "grid", "content": "skip"},
    {"method": "prefix"},
    {"method": "prefix", "prefix": "spans"},
    {"method": "randompos"},
    {"method": "full"},
    {"method": "none"},
]
TRUE = [options for options in VARIANTS if options["method"] in ("chunk", "prefix", "full")
        and options.get("content") != "skip"]  # fmt: skip


def config_of(options: dict, long: int, alpha: float = 0.25) -> SegmentConfig:
    return SegmentConfig(long_length=long, alpha=alpha, **options)


def batch_of(options: dict, long=64, length=16, *, alpha=0.25, starts=(0, 100, 7), seed=0):
    config = config_of(options, long, alpha)
    seeds = [seed * 1000 + number for number in range(len(starts))]
    return segment_batch(STREAM, np.array(starts), length, config, seeds)


def runs(positions: torch.Tensor) -> list[int]:
    """Lengths of the runs of consecutive numbers."""
    found = [1]
    for before, after in zip(positions.tolist(), positions.tolist()[1:], strict=False):
        if after == before + 1:
            found[-1] += 1
        else:
            found.append(1)
    return found


@st.composite
def shapes(draw):
    """Number of segments, window and long length, where every variant is possible."""
    number = draw(st.sampled_from([1, 2, 4, 5]))
    size = draw(st.integers(1, 6))
    return number, number * size, draw(st.integers(number, 4 * number)) * size


# --- every variant --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@given(shape=shapes(), seed=st.integers(0, 2**62))
@settings(max_examples=40)
def test_contract(options, shape, seed):
    number, length, long = shape
    batch = batch_of(options, long, length, alpha=1 / number, seed=seed)
    width = long if options["method"] == "full" else length
    for tensor in (batch.input_ids, batch.position_ids, batch.labels, batch.segment_ids):
        assert tensor.shape == (3, width)
        assert tensor.dtype == torch.int64
    assert (batch.position_ids.diff() > 0).all()
    assert batch.position_ids.min() >= 0
    limit = length if options["method"] == "none" else long
    assert batch.position_ids.max() < limit
    assert (batch.segment_ids.diff() >= 0).all()
    assert (batch.segment_ids[:, 0] == 0).all()
    # The label is always the token after, in the text: here, the next number.
    scored = batch.labels != IGNORE
    assert torch.equal(batch.labels[scored], batch.input_ids[scored] + 1)
    if options["method"] != "prefix":
        assert scored.all()
    again = batch_of(options, long, length, alpha=1 / number, seed=seed)
    assert torch.equal(batch.input_ids, again.input_ids)
    assert torch.equal(batch.position_ids, again.position_ids)


@pytest.mark.parametrize("options", TRUE, ids=str)
def test_tokens_are_those_at_the_positions(options):
    starts = [0, 100, 7]
    batch = batch_of(options, starts=starts)
    for row, start in enumerate(starts):
        for at in range(batch.input_ids.shape[1]):
            place = start + int(batch.position_ids[row, at])
            assert batch.input_ids[row, at] == int(STREAM[place])
            if batch.labels[row, at] != IGNORE:
                assert batch.labels[row, at] == int(STREAM[place + 1])


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_row_depends_on_its_seed_alone(options):
    config = config_of(options, 64)
    starts, seeds = np.array([3, 90, 41]), [5, 6, 7]
    whole = segment_batch(STREAM, starts, 16, config, seeds)
    for row in range(3):
        alone = segment_batch(STREAM, starts[row : row + 1], 16, config, seeds[row : row + 1])
        assert torch.equal(alone.input_ids[0], whole.input_ids[row])
        assert torch.equal(alone.position_ids[0], whole.position_ids[row])
    if options["method"] not in ("none", "full"):
        other = segment_batch(STREAM, starts, 16, config, [8, 9, 10])
        assert not torch.equal(other.position_ids, whole.position_ids) or not torch.equal(
            other.input_ids, whole.input_ids
        )


@pytest.mark.parametrize("options", TRUE, ids=str)
def test_no_label_where_the_text_ends(options):
    """With a stream of exactly the long text, its last token has no next one."""
    config = config_of(options, 24, alpha=0.5)
    for seed in range(60):
        batch = segment_batch(STREAM[:24], np.array([0]), 12, config, [seed])
        for position, label in zip(batch.position_ids[0], batch.labels[0], strict=True):
            if position == 23:
                assert label == IGNORE
            elif options["method"] != "prefix":
                assert label != IGNORE


# --- the ordinary batch is a special case ---------------------------------------------------------


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_long_text_as_long_as_the_window_is_the_ordinary_batch(options):
    ordinary = windows(STREAM, np.array([0, 100, 7]), 16)
    batch = batch_of(options, long=16, length=16)
    assert torch.equal(batch.input_ids, ordinary.input_ids)
    assert torch.equal(batch.position_ids, ordinary.position_ids)
    scored = batch.labels != IGNORE
    assert torch.equal(batch.labels[scored], ordinary.labels[scored])
    assert scored.sum(1).tolist() == [4 if options["method"] == "prefix" else 16] * 3


@pytest.mark.parametrize("options", [v for v in VARIANTS if v["method"] in ("chunk", "prefix")],
                         ids=str)  # fmt: skip
def test_one_segment_is_an_ordinary_window_of_the_long_text(options):
    batch = batch_of(options, long=64, length=16, alpha=1.0)
    assert (batch.position_ids.diff() == 1).all()
    assert torch.equal(batch.labels, batch.input_ids + 1)
    assert (batch.input_ids.diff() == 1).all()
    assert (batch.segment_ids == 0).all()
    if options.get("content") != "skip":
        first = batch.input_ids[:, 0] - batch.position_ids[:, 0]
        assert first.tolist() == [1, 101, 8]


# --- what a causal model sees ---------------------------------------------------------------------


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_causal_by_order_is_causal_by_position(options):
    batch = batch_of(options)
    positions = batch.position_ids
    earlier = positions[:, :, None] >= positions[:, None, :]
    assert torch.equal(earlier, torch.ones_like(earlier).tril())


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_the_last_segment_hears_of_the_first_token(options):
    """Plain causal attention over a row, told nothing of its gaps, as a model would do it."""

    def outputs(stream: np.ndarray) -> torch.Tensor:
        batch = segment_batch(stream, np.array([0]), 16, config_of(options, 64), [3])
        x = torch.nn.functional.one_hot(batch.input_ids, 1100).double()[:, None]
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)[0, 0]

    first = segment_batch(STREAM, np.array([0]), 16, config_of(options, 64), [3]).input_ids[0, 0]
    changed = STREAM.copy()
    changed[int(first) - 1] = 1050
    difference = (outputs(changed) - outputs(STREAM)).abs().amax(-1)
    assert difference[-4:].min() > 0


# --- the variants ---------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["free", "grid"])
def test_chunks(placement):
    for seed in range(100):
        batch = batch_of({"method": "chunk", "placement": placement}, seed=seed)
        for row in range(3):
            pieces = runs(batch.position_ids[row])
            assert len(pieces) <= 4
            assert all(piece % 4 == 0 for piece in pieces)
            assert batch.segment_ids[row].tolist() == [number // 4 for number in range(16)]
            if placement == "grid":
                assert (batch.position_ids[row, ::4] % 4 == 0).all()


def test_chunk_labels_never_cross_a_join():
    batch = batch_of({"method": "chunk"}, starts=range(0, 900, 9))
    inside = batch.position_ids.diff() == 1
    joins = ~inside
    assert joins.sum() > 200
    following = batch.input_ids[:, 1:]
    assert torch.equal(batch.labels[:, :-1][inside], following[inside])
    assert (batch.labels[:, :-1][joins] != following[joins]).all()


def test_skip_has_adjoining_text_and_positions_of_chunks():
    starts = range(0, 900, 9)
    true = batch_of({"method": "chunk"}, starts=starts)
    skip = batch_of({"method": "chunk", "content": "skip"}, starts=starts)
    assert torch.equal(true.position_ids, skip.position_ids)
    assert (skip.input_ids.diff() == 1).all()
    offsets = skip.input_ids[:, 0] - 1 - torch.tensor(starts)
    assert offsets.min() >= 0
    assert offsets.max() <= 48
    assert offsets.unique().numel() > 20


@pytest.mark.parametrize("prefix", ["tokens", "spans"])
def test_prefix(prefix):
    starts = set()
    for seed in range(300):
        batch = batch_of({"method": "prefix", "prefix": prefix}, seed=seed, starts=[0])
        positions = batch.position_ids[0]
        assert (positions[12:].diff() == 1).all()
        assert (batch.labels[0, :12] == IGNORE).all()
        assert (batch.labels[0, 12:] != IGNORE).all()
        assert (batch.segment_ids[0, 12:] == batch.segment_ids[0, 11] + 1).all()
        starts.add(int(positions[12]))
        if prefix == "spans":
            assert all(piece % 4 == 0 for piece in runs(positions)[:-1])
            assert batch.segment_ids[0].tolist() == [number // 4 for number in range(16)]
        else:
            assert batch.segment_ids[0].tolist() == [0] * 12 + [1] * 4
    assert starts == set(range(12, 61))  # every start of a suffix that leaves room for the prefix


def test_random_positions_have_contiguous_text():
    seen = np.zeros(64, dtype=int)
    for seed in range(100):
        batch = batch_of({"method": "randompos"}, seed=seed)
        assert (batch.input_ids.diff() == 1).all()
        seen += np.bincount(batch.position_ids.flatten(), minlength=64)
    assert seen.min() > 0.5 * seen.mean()


def test_full_is_the_long_text():
    batch = batch_of({"method": "full"})
    long = windows(STREAM, np.array([0, 100, 7]), 64)
    for name in ("input_ids", "position_ids", "labels", "segment_ids"):
        assert torch.equal(getattr(batch, name), getattr(long, name)), name


# --- the mechanism: long distances ----------------------------------------------------------------


def histogram(options: dict, draws: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """How often each position, and each distance of two tokens of a window, occurs."""
    config, generator = config_of(options, 24, alpha=0.25), np.random.default_rng(0)
    positions, distances = np.zeros(24, dtype=int), np.zeros(24, dtype=int)
    for _ in range(draws):
        drawn = pick(config, 8, generator).positions
        positions += np.bincount(drawn, minlength=24)
        gaps = drawn[:, None] - drawn
        distances += np.bincount(gaps[gaps > 0], minlength=24)
    return positions, distances


@pytest.mark.parametrize("options", [
    {"method": "chunk"}, {"method": "chunk", "placement": "grid"},
    {"method": "chunk", "content": "skip"}, {"method": "prefix"},
    {"method": "prefix", "prefix": "spans"}, {"method": "randompos"},
], ids=str)  # fmt: skip
def test_every_position_and_every_distance_occurs(options):
    positions, distances = histogram(options)
    assert positions.min() > 0
    assert distances[1:].min() > 0, distances


def test_plain_windows_never_show_a_distance_of_their_length():
    positions, distances = histogram({"method": "none"}, draws=10)
    assert distances[1:8].min() > 0
    assert distances[8:].sum() == 0


def test_every_placement_of_chunks_occurs():
    """8 places for 2 chunks of 2 in 6: free starts (0,2) (0,3) (0,4) (1,3) (1,4) (2,4)."""
    generator, config = np.random.default_rng(1), config_of({"method": "chunk"}, 6, alpha=0.5)
    drawn = {tuple(pick(config, 4, generator).positions[::2].tolist()) for _ in range(300)}
    assert drawn == {(0, 2), (0, 3), (0, 4), (1, 3), (1, 4), (2, 4)}
    grid = config_of({"method": "chunk", "placement": "grid"}, 6, alpha=0.5)
    drawn = {tuple(pick(grid, 4, generator).positions[::2].tolist()) for _ in range(300)}
    assert drawn == {(0, 2), (0, 4), (2, 4)}


# --- options that do not fit ----------------------------------------------------------------------


def test_bad_options():
    cases = [
        ({"method": "chunk"}, 16, ["segments.long_length is not set", "chunk"]),
        ({"method": "full", "long_length": 8}, 16, ["long_length: 8", "16"]),
        ({"method": "chunk", "long_length": 64, "alpha": 0.3}, 16, ["alpha: 0.3", "whole number"]),
        ({"method": "chunk", "long_length": 64, "alpha": 0.0}, 16, ["alpha: 0.0"]),
        ({"method": "prefix", "long_length": 64, "alpha": -0.5}, 16, ["alpha: -0.5"]),
        ({"method": "prefix", "long_length": 64, "alpha": 1.5}, 16, ["alpha: 1.5"]),
        ({"method": "chunk", "long_length": 64}, 18, ["alpha: 0.25", "18 tokens"]),
        (
            {"method": "chunk", "long_length": 66, "placement": "grid"},
            16,
            ["grid", "4 tokens", "66"],
        ),
        ({"method": "prefix", "long_length": 64, "content": "skip"}, 16, ["skip", "not prefix"]),
    ]
    for options, length, parts in cases:
        with pytest.raises(UserError) as caught:
            long_length(SegmentConfig(**options), length)
        assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)
    assert long_length(SegmentConfig(), 16) == 16
    assert window_length(SegmentConfig(method="full", long_length=64), 16) == 64
    assert window_length(SegmentConfig(method="chunk", long_length=64), 16) == 16
