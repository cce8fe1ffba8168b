"""Bucket ids against plain Python, and what must hold of every such function (papers, D3)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import buckets as plain

import irpe

METHODS = ("euc", "quant", "rank", "cross", "product")
UNDIRECTED = ("euc", "quant", "rank")
GRIDS = [(7, 5, 0), (1, 6, 1), (3, 4, 5), (14, 14, 1)]


def spec_of(method, ratio=1.9, more=""):
    return irpe.parse(f"rpe-{ratio}-{method}-ctx-1-k{more}")


def ids_of(spec, geometry):
    """A tuple of id tensors and N, for all methods alike."""
    ids, size = irpe.bucket_ids(spec, geometry)
    return (ids if isinstance(ids, tuple) else (ids,)), size


@pytest.mark.cases(49)
@pytest.mark.parametrize("more", ["", ",index=clip,beta=3", ",alpha=1,beta=4.5,gamma=9"])
@pytest.mark.parametrize("size", GRIDS[:3])
@pytest.mark.parametrize("ratio", [1.0, 1.9, 2.5, 20])
@pytest.mark.parametrize("method", METHODS)
def test_ids_against_loops(method, ratio, size, more):
    spec = spec_of(method, ratio, more)
    found, number = ids_of(spec, irpe.Grid(*size))
    where = plain.grid(*size)
    assert number == plain.num_buckets(spec, size[2])
    for ids, function in zip(found, plain.buckets(spec), strict=True):
        assert ids.dtype == torch.int64
        assert ids.tolist() == plain.ids(function, where, where, number - 1)


@pytest.mark.parametrize("method", METHODS)
def test_ids_of_given_positions(method):
    """Far apart, negative, per sample; int32 too, and queries that are not the keys."""
    spec = spec_of(method, 3.0)
    query = torch.randint(-40, 40, (2, 5, 2), dtype=torch.int32)
    key = torch.randint(-40, 40, (2, 4, 2), dtype=torch.int32)
    found, number = ids_of(spec, irpe.Geometry(query, key, prefix=0, key_prefix=2))
    for ids, function in zip(found, plain.buckets(spec), strict=True):
        for b in range(2):
            queries = [tuple(p) for p in query[b].tolist()]
            keys = [None, None] + [tuple(p) for p in key[b].tolist()]
            assert ids[b].tolist() == plain.ids(function, queries, keys, number - 1)


@pytest.mark.full
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(METHODS),
    st.floats(0.5, 12).map(lambda x: round(x, 2)),
    st.lists(st.tuples(st.integers(-200, 200), st.integers(-200, 200)), min_size=1, max_size=6),
)
def test_any_ratio_any_position(method, ratio, positions):
    spec = spec_of(method, ratio)
    found, number = ids_of(spec, irpe.Geometry(torch.tensor(positions)))
    for ids, function in zip(found, plain.buckets(spec), strict=True):
        assert ids.tolist() == plain.ids(function, positions, positions, None)
        assert int(ids.min()) >= 0 and int(ids.max()) < number


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_extreme_positions(method, dtype):
    """The far corners of what the integers hold: no wrap-around on the way to the last bucket."""
    spec = spec_of(method)
    far = torch.iinfo(dtype).max // 2
    positions = torch.tensor([[-far, -far], [far, far], [far, -far], [0, 0]], dtype=dtype)
    found, number = ids_of(spec, irpe.Geometry(positions))
    where = [tuple(p) for p in ((-60, -60), (60, 60), (60, -60), (0, 0))]  # past the reach too
    for ids, function in zip(found, plain.buckets(spec), strict=True):
        assert ids.tolist() == plain.ids(function, where, where, None)


def test_small_integers_do_not_wrap():
    """uint8 and int8 positions: offsets are taken in a type that holds them."""
    for dtype, most in ((torch.uint8, 200), (torch.int8, 100)):
        low = -most if dtype == torch.int8 else 0
        positions = torch.tensor([[low, 0], [most, 3], [2, most]])
        found, _ = irpe.bucket_ids(spec_of("product"), irpe.Geometry(positions.to(dtype)))
        wanted, _ = irpe.bucket_ids(spec_of("product"), irpe.Geometry(positions))
        assert torch.equal(found, wanted), dtype


@pytest.mark.parametrize(
    ("ratio", "row"),
    [
        (1.9, [0, 1, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3]),
        (2.0, [0, 1, 2, 2, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4]),
        (2.5, [0, 1, 2, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 4]),
        (3.0, [0, 1, 2, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 5]),
    ],
)
def test_piecewise_table(ratio, row):
    assert irpe.RPE(ratio=ratio).buckets()[0].index(torch.arange(14)).tolist() == row


@settings(max_examples=80, deadline=None)
@given(st.floats(0.5, 50), st.sampled_from(["piecewise", "clip"]))
def test_step_index_is_odd_monotone_and_bounded(ratio, index):
    spec = irpe.RPE(ratio=ratio, index=index)
    x = torch.arange(-900, 901)
    y = spec.buckets()[0].index(x)
    assert torch.equal(y, -y.flip(0)) and y[900] == 0
    assert (y.diff() >= 0).all()
    assert int(y.max()) <= int(2 * spec.ratio) and int(y[901]) <= 1
    assert y.tolist() == [plain.step(spec, int(v)) for v in x]


def test_clip_is_clip():
    x = torch.arange(-30, 31)
    assert torch.equal(irpe.RPE(index="clip", beta=4.7).buckets()[0].index(x), x.clamp(-4, 4))


@pytest.mark.parametrize(
    "spec", ["rpe-9.0-cross-ctx-1-k,index=clip,beta=30000", "rpe-3000.0-cross-ctx-1-k"]
)
def test_large_ranges_stay_cheap(spec):
    """A look-up table over distances, not over distances times buckets."""
    spec = irpe.parse(spec)
    found, _ = ids_of(spec, irpe.Grid(1, 7))
    where = plain.grid(1, 7)
    for ids, function in zip(found, plain.buckets(spec), strict=True):
        assert ids.tolist() == plain.ids(function, where, where, None)


@pytest.mark.parametrize(
    ("name", "used", "allocated"),
    [
        ("rpe-20.0-euc-ctx-1-k", 20, 82),
        ("rpe-33.0-quant-ctx-1-k", 51, 134),
        ("rpe-20.0-cross-ctx-1-k", 56, 164),
        ("rpe-1.9-product-ctx-1-k", 50, 50),
        ("rpe-2.0-product-ctx-1-k", 82, 82),
        ("rpe-2.5-product-ctx-1-k", 82, 122),
        ("rpe-3.0-product-ctx-1-k", 122, 170),
    ],
)
def test_used_buckets_of_the_published_models(name, used, allocated):
    """At 14x14 with a class token; rows and columns of cross have one prefix bucket each."""
    found, number = ids_of(irpe.parse(name), irpe.Grid(14, 14, prefix=1))
    assert sum(ids.unique().numel() for ids in found) == used
    assert number * len(found) == allocated


@pytest.mark.parametrize("method", METHODS)
def test_only_the_offset_counts(method):
    spec = spec_of(method, 3.0)
    positions = torch.randint(0, 9, (8, 2))
    moved = positions + torch.tensor([-17, 5])
    for a, b in zip(
        ids_of(spec, irpe.Geometry(positions))[0],
        ids_of(spec, irpe.Geometry(moved))[0],
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("size", GRIDS)
@pytest.mark.parametrize("method", METHODS)
def test_mirrored_pairs(method, size):
    """I(i, j) = I(j, i) where direction does not count; else the index of the opposite offset."""
    height, width, prefix = size
    found, number = ids_of(spec_of(method), irpe.Grid(*size))
    for ids in found:
        patches = ids[prefix:, prefix:]
        if method in UNDIRECTED:
            assert torch.equal(patches, patches.T)
        else:
            last = number - (prefix > 0) - 1
            assert torch.equal(patches, last - patches.T)
            if (patches != patches[0, 0]).any():  # one row of patches has one bucket of rows
                assert not torch.equal(patches, patches.T)


@pytest.mark.parametrize("size", GRIDS)
@pytest.mark.parametrize("method", METHODS)
def test_prefix_rows_and_columns(method, size):
    """One bucket for every pair with a prefix token, which no other pair uses."""
    height, width, prefix = size
    found, number = ids_of(spec_of(method), irpe.Grid(*size))
    plainly, fewer = ids_of(spec_of(method), irpe.Grid(height, width))
    for ids, without in zip(found, plainly, strict=True):
        assert torch.equal(ids[prefix:, prefix:], without)
        if prefix:
            assert number == fewer + 1
            assert (ids[:prefix] == number - 1).all() and (ids[:, :prefix] == number - 1).all()
            assert (without < number - 1).all()


@pytest.mark.parametrize("method", METHODS)
def test_crop_of_a_larger_grid(method):
    """Ids of a smaller grid are those of the same tokens in a larger one."""
    spec = spec_of(method, 3.0)
    chosen = (torch.arange(3).unsqueeze(1) * 9 + torch.arange(5)).flatten() + 1
    large, _ = ids_of(spec, irpe.Grid(8, 9, prefix=1))
    chosen = torch.cat((torch.zeros(1, dtype=torch.long), chosen))
    for a, b in zip(large, ids_of(spec, irpe.Grid(3, 5, prefix=1))[0], strict=True):
        assert torch.equal(a[chosen][:, chosen], b)


def test_product_of_one_row_is_shaw_in_one_dimension():
    spec = spec_of("product")
    ids, _ = irpe.bucket_ids(spec, irpe.Grid(1, 9))
    offsets = torch.arange(9).unsqueeze(1) - torch.arange(9)
    index = spec.buckets()[0].index(offsets)
    assert torch.equal(ids, index + 3 * 7 + 3)
    ids, _ = irpe.bucket_ids(spec, irpe.Grid(9, 1))
    assert torch.equal(ids, (index + 3) * 7 + 3)


def test_cross_is_its_two_axes():
    (rows, columns), _ = ids_of(spec_of("cross"), irpe.Grid(4, 6))
    product, _ = irpe.bucket_ids(spec_of("product"), irpe.Grid(4, 6))
    assert torch.equal(product, rows * 7 + columns)
    rows, columns = rows.view(4, 6, 4, 6), columns.view(4, 6, 4, 6)
    assert torch.equal(rows, rows[:, :1, :, :1].expand_as(rows))
    assert torch.equal(columns, columns[:1, :, :1].expand_as(columns))


def test_half_turn_of_the_image():
    """The last token becomes the first: all offsets change their sign."""
    ids, number = irpe.bucket_ids(spec_of("product"), irpe.Grid(4, 5))
    assert torch.equal(ids.flip(0, 1), number - 1 - ids)


def test_ranks_number_the_distances():
    """On 14x14, 94 distinct distances get 94 consecutive ranks."""
    spec = irpe.parse("rpe-2.0-rank-ctx-1-k,index=clip,beta=500")
    ids, _ = irpe.bucket_ids(spec, irpe.Grid(14, 14))
    squares = {r * r + c * c for r in range(14) for c in range(14)}
    assert len(squares) == 94 == ids.unique().numel()
    assert ids[0, 0] == 500 and ids[0, 1] == 501 and ids[0, 15] == 502 and ids[0, 2] == 503


def test_terms_share_ids_and_expand_as_documented():
    """The flat form is the dense one, laid end to end; by key, rows belong to the keys."""
    from irpe.buckets import BucketIds

    (function,) = spec_of("product").buckets()
    geometry = irpe.Geometry(
        torch.randint(0, 9, (2, 3, 2)), torch.randint(0, 9, (2, 4, 2)), prefix=1
    )
    cpu = torch.device("cpu")
    forward, backward = (
        BucketIds(function, geometry),
        BucketIds(function, geometry).oriented(by_key=True),
    )
    N = forward.size
    dense, flat = forward.dense(cpu), forward.flat(cpu)
    rows = torch.arange(4).view(1, 4, 1) * N
    assert torch.equal(flat.view(2, 4, 5), dense + rows) and flat.shape == (2, 1, 20)
    rows = torch.arange(5).view(1, 1, 5) * N
    assert torch.equal(backward.flat(cpu).view(2, 4, 5), backward.dense(cpu) + rows)
    patches = dense[:, 1:, 1:]
    assert torch.equal(backward.dense(cpu)[:, 1:, 1:], N - 2 - patches)
