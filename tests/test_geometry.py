"""Grids and other geometries: positions, lengths, what is remembered and what is not."""

import copy
import pickle

import pytest
import torch
from oracles import buckets as plain

import irpe

CPU = torch.device("cpu")
K = "rpe-1.9-product-ctx-1-k"


@pytest.mark.parametrize("size", [(7, 5, 0), (1, 6, 1), (3, 4, 5)])
def test_grid(size):
    height, width, prefix = size
    grid = irpe.Grid(*size)
    query, key = grid.positions(CPU)
    wanted = [list(p) for p in plain.grid(height, width)]
    assert query.tolist() == wanted == key.tolist()
    assert grid.query_length == grid.key_length == prefix + height * width
    assert (grid.axes, grid.batch, grid.prefix, grid.key_prefix) == (2, None, prefix, prefix)
    offsets = grid.offsets(CPU)
    assert offsets.shape == (height * width, height * width, 2)
    assert torch.equal(offsets, query[:, None] - key[None])
    assert repr(grid) == f"Grid({height}, {width}, prefix={prefix})"


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_select(dtype):
    kept = torch.tensor([[0, 7, 11], [2, 3, 9]], dtype=dtype)
    grid = irpe.Grid(3, 4, prefix=2).select(kept)
    query, key = grid.positions(CPU)
    assert query.tolist() == [[[0, 0], [1, 3], [2, 3]], [[0, 2], [0, 3], [2, 1]]] == key.tolist()
    assert (grid.batch, grid.query_length, grid.key_length, grid.prefix) == (2, 5, 5, 2)
    assert (grid.height, grid.width) == (3, 4)
    one = irpe.Grid(3, 4).select(kept[0])
    assert one.batch is None and one.positions(CPU)[0].tolist() == [[0, 0], [1, 3], [2, 3]]


def test_geometry_of_two_lengths():
    query, key = torch.randint(0, 9, (3, 2)), torch.randint(0, 9, (2, 5, 2))
    geometry = irpe.Geometry(query, key, prefix=1, key_prefix=2)
    assert (geometry.query_length, geometry.key_length, geometry.batch) == (4, 7, 2)
    assert geometry.offsets(CPU).shape == (2, 3, 5, 2)
    ids, _ = irpe.bucket_ids(K, geometry)
    assert ids.shape == (2, 4, 7)
    assert irpe.Geometry(query, prefix=3).key_prefix == 3
    single = irpe.Geometry(query.unsqueeze(0), key[:1])
    assert single.batch is None and irpe.bucket_ids(K, single)[0].shape == (3, 5)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))]
)
@pytest.mark.parametrize(
    "geometry",
    [
        irpe.Grid(3, 4, prefix=1),
        irpe.Grid(3, 4).select(torch.tensor([[1, 2], [5, 7]])),
        irpe.Geometry(
            torch.arange(6).view(3, 2), torch.arange(8).view(4, 2), prefix=1, key_prefix=0
        ),
        irpe.Sequence(5),
    ],
    ids=repr,
)
def test_copies(geometry, copied):
    if geometry.axes == 2:
        irpe.bucket_ids(K, geometry)
    other = copied(geometry)
    assert repr(other) == repr(geometry) and type(other) is type(geometry)
    assert torch.equal(other.offsets(CPU), geometry.offsets(CPU))
    if geometry.axes == 2:
        assert torch.equal(irpe.bucket_ids(K, other)[0], irpe.bucket_ids(K, geometry)[0])
    by_value = not geometry.explicit
    assert (other == geometry) == by_value and (hash(other) == hash(geometry)) == by_value


def test_given_positions_are_not_changed():
    positions = torch.randint(0, 9, (5, 2))
    before = positions.clone()
    geometry = irpe.Geometry(positions)
    irpe.bucket_ids(K, geometry)
    irpe.bucket_ids("rpe-1.9-cross-ctx-1-k", geometry)
    assert torch.equal(positions, before)


def test_ids_on_another_device():
    ids, _ = irpe.bucket_ids(K, irpe.Grid(3, 4), device="meta")
    assert ids.is_meta and ids.shape == (12, 12)


def test_sequences_make_their_positions_where_they_are_needed():
    text = irpe.Sequence(5, prefix=2)
    query, key = text.positions(torch.device("cpu"))
    assert query is key and query.tolist() == [[0], [1], [2], [3], [4]]
    assert text.positions(torch.device("meta"))[0].device.type == "meta"
    assert (text.query_length, text.key_length, text.axes, text.batch) == (7, 7, 1, None)
    assert not text.explicit and text.readable() is None
    cached = irpe.Sequence(2, positions=torch.tensor([8, 9]), keys=torch.arange(10), key_prefix=3)
    assert (cached.query_length, cached.key_length, cached.prefix) == (2, 13, 0)
    assert cached.explicit and cached.readable()[1].shape == (10, 1)
    ahead = irpe.Sequence(2, keys=torch.arange(4))
    assert ahead.positions(torch.device("cpu"))[0].tolist() == [[0], [1]]


def test_positions_are_readable_only_where_their_values_are():
    meta = irpe.Sequence(3, positions=torch.zeros(3, device="meta"))
    assert meta.explicit and meta.readable() is None
    seen = []
    torch.vmap(lambda p: seen.append(irpe.Sequence(3, positions=p).readable()) or p)(
        torch.zeros(2, 3)
    )
    assert seen == [None]
