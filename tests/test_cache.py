"""The cache of what is derived from geometries: shared, bounded in bytes, cleared, kept apart."""

import gc
import itertools
import threading
import weakref

import pytest
import torch

import irpe
from irpe.cache import OVERHEAD, Cache, nbytes

K = "rpe-1.9-product-ctx-1-k"


@pytest.fixture
def cache(monkeypatch):
    """An empty cache of its own for each test."""
    made = Cache(2**20)
    for module in (irpe.cache, irpe.geometry):
        monkeypatch.setattr(module, "CACHE", made)
    return made


def ids(geometry):
    return irpe.bucket_ids(K, geometry)[0]


def held(cache):
    """Bytes of all values, counted afresh."""
    return sum(OVERHEAD + nbytes(value) for value, _ in cache._values.values())


def test_equal_geometries_share(cache):
    first = ids(irpe.Grid(3, 4, prefix=1))
    assert ids(irpe.Grid(3, 4, prefix=1)) is first
    for other in (irpe.Grid(4, 3, prefix=1), irpe.Grid(3, 4), irpe.Grid(3, 4, prefix=2)):
        assert ids(other) is not first
    assert ids(irpe.Grid(3, 4, prefix=1)) is first
    # Positions that are given may be changed in place, so equal ones are not compared.
    given = [irpe.Grid(3, 4, positions=torch.tensor([[0, 1], [2, 3]])) for _ in range(2)]
    assert ids(given[0]) is not ids(given[1]) and ids(given[0]) is ids(given[0])


def test_a_geometry_of_another_class_does_not_share(cache):
    class Transposed(irpe.Grid):
        def _all_positions(self, device):
            return super()._all_positions(device).flip(-1)

    assert not torch.equal(ids(irpe.Grid(3, 4)), ids(Transposed(3, 4)))
    assert irpe.Grid(3, 4) != Transposed(3, 4) and irpe.Grid(3, 4) == irpe.Grid(3, 4)


def test_many_grids_stay_below_the_limit(cache):
    oldest = weakref.ref(ids(irpe.Grid(1, 1)))
    for height, width in itertools.product(range(1, 16), repeat=2):
        assert ids(irpe.Grid(height, width)).shape == (height * width,) * 2
        assert cache.used == held(cache) <= cache.limit
    # The newest are there, the oldest are not.
    last = irpe.Grid(15, 15)
    assert ids(last) is ids(irpe.Grid(15, 15))
    assert oldest() is None


def test_a_value_that_is_read_is_dropped_last():
    cache, third = Cache(3 * (OVERHEAD + 8)), torch.zeros(1, dtype=torch.int64)
    for key in "abc":
        cache.put(key, third.clone())
    cache.get("a")
    cache.put("d", third.clone())
    assert [key for key in "abcd" if cache.get(key) is not None] == ["a", "c", "d"]
    cache.put("a", third.clone())  # replaced, not counted twice
    assert cache.used == held(cache) == 3 * (OVERHEAD + 8)


def test_a_value_above_the_limit_is_not_stored_and_drops_nothing():
    cache = Cache(2**13)
    cache.put("small", torch.zeros(8))
    cache.put("large", torch.zeros(2**13))
    assert cache.get("small") is not None and cache.get("large") is None


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(5, dtype=torch.int64),
        (torch.zeros(2), [torch.zeros(8, dtype=torch.int64)[:1]]),  # the whole storage is held
        {"a": torch.zeros(10)},
    ],
    ids=["tensor", "view in a list", "dict"],
)
def test_bytes(value):
    wanted = {torch.Tensor: 40, tuple: 72, dict: 40}[type(value)]
    assert nbytes(value) == wanted


def test_given_positions_are_freed_with_their_geometry(cache):
    grid = irpe.Grid(9, 9).select(torch.arange(30))
    alive = weakref.ref(ids(grid))
    before = cache.used
    assert alive() is not None and before > 30 * 30 * 8
    del grid
    gc.collect()
    assert alive() is None and cache.used == held(cache) == 0
    for _ in range(50):  # nothing piles up
        ids(irpe.Grid(9, 9).select(torch.arange(30)))
    gc.collect()
    assert cache.used == 0


def test_clear_cache(cache):
    grid, given = irpe.Grid(3, 4), irpe.Grid(3, 4).select(torch.arange(5))
    first, second = weakref.ref(ids(grid)), weakref.ref(ids(given))
    irpe.clear_cache()
    assert first() is None and second() is None and cache.used == 0
    assert ids(grid).shape == (12, 12) and ids(given).shape == (5, 5)
    assert cache.used == held(cache) > 0


def test_threads(cache):
    """Many at once: right values, and a count of bytes that is right afterwards."""
    sizes = list(itertools.product(range(1, 13), repeat=2))
    wanted = {size: ids(irpe.Grid(*size)).clone() for size in sizes}
    wrong, start = [], threading.Barrier(4)

    def work(number):
        start.wait()
        for height, width in sizes[number:] + sizes[:number]:
            try:
                grid = irpe.Grid(height, width).select(torch.arange(height * width))
                for geometry in (irpe.Grid(height, width), grid):
                    if not torch.equal(ids(geometry), wanted[height, width]):
                        wrong.append((height, width))
                if not (height + width + number) % 9:
                    irpe.clear_cache()
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(30 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert not wrong and cache.used == held(cache) <= cache.limit


def test_nothing_is_kept_while_a_graph_is_traced(cache):
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = irpe.RPEAttention(8, 2, K, prefix=1)
    x = torch.randn(1, 7, 8)
    call = torch.compile(lambda x: layer(x, irpe.Grid(2, 3, prefix=1)), backend="aot_eager")
    compiled = call(x)
    with FakeTensorMode():
        ids(irpe.Grid(2, 3))
    torch.func.vmap(lambda x: layer(x.unsqueeze(0), irpe.Grid(2, 3, prefix=1)))(x)
    assert cache.used == 0
    torch.testing.assert_close(layer(x, irpe.Grid(2, 3, prefix=1)), compiled)
    assert cache.used > 0
    with FakeTensorMode():  # what is kept is real, and is not handed out there
        assert type(ids(irpe.Grid(2, 3, prefix=1))).__name__ == "FakeTensor"


def test_inference_and_training_are_kept_apart(cache):
    grid = irpe.Grid(2, 3, prefix=1)
    with torch.inference_mode():
        first = ids(grid)
        assert ids(grid) is first and first.is_inference()
    second = ids(grid)
    assert not second.is_inference() and ids(grid) is second
    layer, x = irpe.RPEAttention(8, 2, K, prefix=1), torch.randn(1, 7, 8)
    with torch.inference_mode():
        layer(x, irpe.Grid(2, 3, prefix=1))
    layer(x, irpe.Grid(2, 3, prefix=1)).sum().backward()
    assert layer.rpe_k.table.grad is not None
