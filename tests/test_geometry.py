"""Grids and other geometries: positions, lengths, what is remembered and what is not."""

import copy
import pickle

import pytest
import torch
from common import TILES
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


def test_all_selected_is_the_grid():
    whole, chosen = irpe.Grid(3, 4, prefix=1), irpe.Grid(3, 4, prefix=1).select(torch.arange(12))
    assert torch.equal(irpe.bucket_ids(K, whole)[0], irpe.bucket_ids(K, chosen)[0])


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


def test_sequence():
    text = irpe.Sequence(5, prefix=1)
    assert text.axes == 1 and text.query_length == 6
    assert text.positions(CPU)[0].flatten().tolist() == [0, 1, 2, 3, 4]
    cached = irpe.Sequence(1, positions=torch.tensor([7]), keys=torch.arange(8))
    assert (cached.query_length, cached.key_length) == (1, 8)
    assert cached.offsets(CPU).flatten().tolist() == [7, 6, 5, 4, 3, 2, 1, 0]


def _counted(monkeypatch):
    from irpe.buckets import ids

    calls = []
    plainly = ids.BucketIds._dense

    def dense(self, device):
        calls.append(self)
        return plainly(self, device)

    monkeypatch.setattr(ids.BucketIds, "_dense", dense)
    return calls


@pytest.mark.parametrize("backend", ["reference", "eager", *TILES, "sdpa"])
def test_layers_share_their_ids(monkeypatch, backend, request):
    """Twelve layers with a grid each look offsets up once: equal grids share their ids."""
    irpe.clear_cache()
    calls = _counted(monkeypatch)
    layers = [irpe.RPEAttention(12, 2, K, backend=backend, prefix=1) for _ in range(12)]
    grid, x = irpe.Grid(3, 4, prefix=1), torch.randn(2, 13, 12)
    for layer in layers:
        layer(x, irpe.Grid(3, 4, prefix=1)).sum().backward()
    # Tiles copy blocks of a grid, and look up no map of all pairs.
    assert len(calls) == (request.node.get_closest_marker("tiles") is None)
    a, b = (layer.rpe_k.terms(grid)[0].buckets for layer in layers[:2])
    assert a.dense(CPU) is b.dense(CPU) and a.flat(CPU) is b.flat(CPU)


def test_other_specs_and_sides_do_not_share():
    grid = irpe.Grid(3, 4, prefix=1)
    rpe_q, rpe_k, _ = irpe.build_rpe("rpe-1.9-product-ctx-1-qk", head_dim=4, num_heads=2, prefix=1)
    other = irpe.build_rpe("rpe-3.0-product-ctx-1-k", head_dim=4, num_heads=2, prefix=1)[1]
    q, k, o = (m.terms(grid)[0].buckets.dense(CPU) for m in (rpe_q, rpe_k, other))
    assert not torch.equal(q, k) and not torch.equal(k, o)
    clip = irpe.build_rpe(K + ",index=clip,beta=3", head_dim=4, num_heads=2, prefix=1)[1]
    assert not torch.equal(clip.terms(grid)[0].buckets.dense(CPU), k)


def test_two_grids_do_not_share():
    tall, wide = irpe.Grid(4, 3), irpe.Grid(3, 4)
    assert not torch.equal(irpe.bucket_ids(K, tall)[0], irpe.bucket_ids(K, wide)[0])
    assert not torch.equal(irpe.bucket_ids(K, tall)[0], irpe.bucket_ids(K, wide)[0])


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


def test_inference_mode_then_training():
    grid = irpe.Grid(3, 4, prefix=1)
    with torch.inference_mode():
        first, _ = irpe.bucket_ids(K, grid)
    second, _ = irpe.bucket_ids(K, grid)
    assert first.is_inference() and not second.is_inference()
    assert torch.equal(first.clone(), second)
    x = torch.randn(1, 1, 13, 50, requires_grad=True)
    irpe.lookup(x, second).sum().backward()


def test_ids_of_given_positions_go_with_their_geometry():
    import gc
    import weakref

    grid = irpe.Grid(3, 4, prefix=1).select(torch.arange(5))
    ids = weakref.ref(irpe.bucket_ids(K, grid)[0])
    assert ids() is not None
    del grid
    gc.collect()
    assert ids() is None


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


def test_a_geometry_keeps_no_pair_of_a_tracers_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    text = irpe.Sequence(5)
    with FakeTensorMode():
        text.remember("pair", lambda: (torch.zeros(2), torch.zeros(2)))
    assert type(text.remember("pair", lambda: (torch.ones(2),))[0]) is torch.Tensor
