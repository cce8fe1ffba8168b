"""The tiles of the eager backend against the reference: every pattern of tokens, every mask."""

from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import irpe
from irpe.backends import eager
from irpe.backends.eager import rows, workspace
from irpe.buckets import BucketIds
from irpe.terms import Term

F64 = torch.float64


@pytest.fixture(params=[(40, 4, 99.0), (700, 3, 1.0), (10**6, 5, 99.0), (10**6, 32, 1.0)])
def tiles(monkeypatch, request):
    """Tiles of several sizes, rows of several widths and blocks of any use, for every call."""
    size, width, most = request.param
    monkeypatch.setattr(eager, "keeps", lambda call: False)
    monkeypatch.setattr(workspace, "SIZE", size)
    monkeypatch.setattr(rows, "WIDTH", width)
    monkeypatch.setattr(rows, "MOST", most)
    irpe.clear_cache()
    yield
    irpe.clear_cache()


@dataclass(frozen=True)
class Clip:
    """Offsets on one axis, clipped; with ``fold`` in an order that does not grow with them."""

    clip: int
    fold: bool = False

    @property
    def size(self):
        return 2 * self.clip + 1

    def __call__(self, offsets):
        ids = offsets.squeeze(-1).clamp(-self.clip, self.clip) + self.clip
        return (ids * 2) % self.size if self.fold else ids


def image_terms(spec, grid, heads, dim, dtype=F64):
    modules = irpe.build_rpe(spec, head_dim=dim, num_heads=heads, prefix=grid.prefix, dtype=dtype)
    modules = [m for m in modules if m is not None]
    for m in modules:
        for table in m.parameters():
            torch.nn.init.normal_(table)
    return sum((m.terms(grid) for m in modules), ())


def line_terms(function, geometry, heads, dim):
    buckets = BucketIds(function, geometry)
    n = buckets.size
    shapes = [
        ("query", (1, dim, n), None),
        ("bias", (heads, n), False),
        ("bias", (1, n), True),
        ("key", (heads, dim, n), None),
        ("value", (1, n, dim), None),
    ]
    return tuple(
        Term(kind, torch.randn(shape, dtype=F64, requires_grad=True), buckets, by_key=by_key)
        for kind, shape, by_key in shapes
    )


def compare(terms, geometry, heads=3, dim=4, flat=False, **given):
    """Outputs and gradients; a flat softmax leaves some of these zero."""
    L, S = geometry.query_length, geometry.key_length
    q = torch.randn(2, heads, L, dim, dtype=F64, requires_grad=True)
    k, v = (torch.randn(2, heads, S, dim, dtype=F64, requires_grad=True) for _ in range(2))
    inputs = [q, k, v, *(t.table for t in terms)]
    weight = torch.randn_like(q)
    found, wanted = [], []
    for backend, results in (("eager", found), ("reference", wanted)):
        out = irpe.attention(q, k, v, terms, backend=backend, **given)
        results += [out, *torch.autograd.grad((out * weight).sum(), inputs)]
    assert all(x.abs().max() > 1e-6 for x in wanted[: 1 if flat else None])
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def seen(kind, height, width, prefix):
    """Key padding ``[2, 1, 1, S]``; the second image's differs."""
    first, second = (torch.ones(height, width, dtype=torch.bool) for _ in range(2))
    ahead = torch.ones(2, prefix, dtype=torch.bool)
    match kind:
        case "columns":
            first[:, 3:], second[:, :1] = False, False
        case "rows":
            first[2:], second[:1] = False, False
        case "holes":
            first[1, 2], second[0] = False, False
            second[2:, 1] = False
        case "one patch":
            first[:], second[:] = False, False
            first[1, 2] = second[height - 1, width - 1] = True
            ahead[0] = False
        case "prefix alone":
            first[:] = False
            ahead[1, 1:] = False
    patches = torch.stack((first, second)).flatten(1)
    return torch.cat((ahead, patches), 1)[:, None, None]


GRIDS = [(7, 5, 0), (5, 7, 2), (4, 6, 1)]
SPECS = [
    "rpe-1.9-product-ctx-0-qkv", "rpe-2.0-cross-ctx-1-qkv", "rpe-2.0-product-bias-0-qk",
    "rpe-3.0-euc-ctx-1-qkv", "rpe-2.0-cross-bias-0-k", "rpe-2.0-product-ctx-1-kv,index=clip,beta=1",
]  # fmt: skip


@pytest.mark.cases(21)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("grid", GRIDS)
def test_grids(grid, spec, tiles):
    grid = irpe.Grid(*grid)
    compare(image_terms(spec, grid, 3, 4), grid)


@pytest.mark.cases(11)
@pytest.mark.parametrize("kind", ["columns", "rows", "holes", "one patch", "prefix alone"])
@pytest.mark.parametrize("grid", GRIDS)
def test_key_padding_of_grids(grid, kind, tiles):
    if kind == "prefix alone" and grid[2] == 0:
        pytest.skip("there is no prefix")
    mask = seen(kind, *grid)
    grid = irpe.Grid(*grid)
    terms = image_terms("rpe-2.0-product-ctx-1-qkv", grid, 3, 4)
    flat = kind in ("one patch", "prefix alone")
    compare(terms + image_terms("rpe-2.0-euc-ctx-1-qkv", grid, 3, 4), grid, flat=flat, mask=mask)
    compare(terms, grid, flat=flat, mask=mask[:1])


def test_other_masks_of_grids(tiles):
    grid = irpe.Grid(5, 6, prefix=1)
    terms = image_terms("rpe-2.0-product-ctx-1-qkv", grid, 3, 4)
    for shape in ((31, 31), (2, 1, 31, 31), (3, 1, 31), (2, 3, 1, 31), (31, 1)):
        mask = torch.rand(shape) > 0.3
        compare(terms, grid, mask=mask)
        compare(terms, grid, mask=torch.randn(shape, dtype=F64).masked_fill(~mask, -torch.inf))
    compare(terms, grid, is_causal=True)
    compare(terms, grid, is_causal=True, mask=seen("columns", 5, 6, 1))


def test_terms_of_several_functions_and_grids(tiles):
    """Tables of one index meet in one table; other functions, or another grid, stay apart."""
    grid, other = irpe.Grid(4, 6), irpe.Grid(6, 4)
    specs = (*SPECS[:4], "rpe-1.0-product-ctx-1-qk")
    terms = sum((image_terms(spec, grid, 3, 4) for spec in specs), ())
    compare(terms, grid)
    compare(terms + image_terms(SPECS[0], other, 3, 4), grid, mask=seen("columns", 4, 6, 0))


def arange(*limits):
    return torch.arange(*limits)


LINES = {
    "text": irpe.Sequence(19),
    "prefix": irpe.Sequence(17, prefix=2),
    "every second": irpe.Sequence(15, positions=arange(3, 33, 2)),
    "backwards": irpe.Sequence(15, positions=arange(20, 5, -1)),
    "cache": irpe.Sequence(5, positions=arange(14, 19), keys=arange(19)),
    "far away": irpe.Sequence(6, positions=arange(50, 56), keys=arange(9)),
    "prefixes": irpe.Geometry(
        arange(8).unsqueeze(1), arange(-4, 9).unsqueeze(1), prefix=1, key_prefix=3
    ),
    "more queries": irpe.Sequence(13, keys=arange(7)),
    "prefix of queries": irpe.Sequence(13, positions=arange(13), prefix=2, key_prefix=0),
}


@pytest.mark.cases(7)
@pytest.mark.parametrize("function", [Clip(2), Clip(9), Clip(40), Clip(3, fold=True)])
@pytest.mark.parametrize("where", LINES)
def test_lines(where, function, tiles):
    geometry = LINES[where]
    terms = line_terms(function, geometry, 3, 4)
    flat = where in ("far away", "more queries")  # few keys are seen, with a mask one or none
    compare(terms, geometry, flat=flat)
    compare(terms, geometry, flat=flat, is_causal=True)
    S = geometry.key_length
    mask = torch.ones(2, 1, 1, S, dtype=torch.bool)
    mask[0, ..., S - 2 :], mask[1, ..., :4], mask[1, ..., S - 3] = False, False, False
    compare(terms, geometry, flat=flat, mask=mask)
    compare(terms, geometry, flat=flat, mask=mask, is_causal=True)


OTHERS = {
    "jumps": irpe.Sequence(6, positions=torch.tensor([0, 1, 2, 5, 6, 7])),
    "other steps": irpe.Sequence(6, keys=arange(0, 12, 2)),
    "per sample": irpe.Sequence(6, positions=torch.stack((arange(6), arange(4, 10)))),
    "one query": irpe.Sequence(1, positions=arange(7, 8), keys=arange(8)),
}


@pytest.mark.parametrize("where", OTHERS)
def test_other_positions(where, tiles):
    geometry = OTHERS[where]
    terms = line_terms(Clip(3), geometry, 3, 4)
    compare(terms, geometry)
    compare(terms, geometry, is_causal=True)


def test_columns_of_queries_without_keys(monkeypatch):
    """Of 64 queries in rows of 16, the last 4 have visible keys: other columns have no tile."""
    monkeypatch.setattr(eager, "keeps", lambda call: False)
    monkeypatch.setattr(workspace, "SIZE", 20)
    monkeypatch.setattr(rows, "WIDTH", 16)
    geometry = irpe.Geometry(torch.arange(64)[:, None], torch.arange(4)[:, None])
    terms = line_terms(Clip(4), geometry, 2, 4)
    q = torch.randn(1, 2, 64, 4, dtype=F64, requires_grad=True)
    k, v = (torch.randn(1, 2, 4, 4, dtype=F64, requires_grad=True) for _ in range(2))
    found, wanted = (
        irpe.attention(q, k, v, terms, is_causal=True, backend=name)
        for name in ("eager", "reference")
    )
    torch.testing.assert_close(found, wanted)
    weight = torch.randn_like(found)
    grads = [torch.autograd.grad(out, (q, k, v), weight) for out in (found, wanted)]
    torch.testing.assert_close(*grads)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else [made]:
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
        return made


@pytest.mark.parametrize("geometry", [irpe.Grid(32, 33), irpe.Grid(1, 800), irpe.Sequence(800)])
def test_nothing_as_large_as_the_logits(geometry, monkeypatch):
    """Not of one head even, forward and backward: no logits, and no map of ids."""
    monkeypatch.setattr(workspace, "SIZE", 2**12)
    if isinstance(geometry, irpe.Sequence):
        terms = line_terms(Clip(4), geometry, 2, 4)[:2]
    else:
        terms = image_terms("rpe-2.0-product-ctx-1-kv,index=clip,beta=1", geometry, 2, 4)
    L = geometry.query_length
    q, k, v = (torch.randn(2, 2, L, 4, dtype=F64, requires_grad=True) for _ in range(3))
    with Largest() as largest:
        irpe.attention(q, k, v, terms, backend="eager", dropout_p=0.1).sum().backward()
    assert 0 < largest.numbers < L * L


@pytest.mark.parametrize("mode", ["bias-0-k", "ctx-1-k", "ctx-1-qkv", "text"])
def test_the_largest_tensor_grows_linearly(mode, monkeypatch):
    """Four times as many tokens: rows, tiles and blocks, none with the square of a row's width."""
    monkeypatch.setattr(eager, "keeps", lambda call: False)
    monkeypatch.setattr(workspace, "SIZE", 2**9)
    sizes = []
    for side in (10, 20):
        irpe.clear_cache()
        if mode == "text":
            geometry: irpe.Geometry = irpe.Sequence(side**2)
            terms = line_terms(Clip(4), geometry, 2, 4)
        else:
            geometry = irpe.Grid(side, side)
            terms = image_terms(f"rpe-1.0-product-{mode}", geometry, 2, 4)
        inputs = [torch.randn(1, 2, side**2, 4, dtype=F64, requires_grad=True) for _ in range(3)]
        with Largest() as largest:
            irpe.attention(*inputs, terms, backend="eager").sum().backward()
        sizes.append(largest.numbers)
    assert sizes[1] <= 4 * sizes[0]


def test_dropout_does_not_depend_on_threads_in_between(monkeypatch):
    """The backward pass draws in the tiles of its forward pass."""
    monkeypatch.setattr(eager, "keeps", lambda call: False)
    monkeypatch.setattr(workspace, "SIZE", 350)
    grid = irpe.Grid(5, 7)
    terms = image_terms("rpe-2.0-product-ctx-1-kv", grid, 3, 4)
    inputs = [torch.randn(2, 3, 35, 4, dtype=F64, requires_grad=True) for _ in range(3)]
    threads, grads = torch.get_num_threads(), []
    for between in (threads, threads + 1):
        torch.manual_seed(5)
        out = irpe.attention(*inputs, terms, dropout_p=0.3, backend="eager")
        torch.set_num_threads(between)
        grads.append(torch.autograd.grad(out.sum(), inputs))
        torch.set_num_threads(threads)
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_calls(dtype, monkeypatch):
    """Calls too small for tiles, which the other tests have none of."""
    monkeypatch.undo()  # as outside of the tests
    grid = irpe.Grid(3, 3, prefix=1)
    terms = image_terms(SPECS[0], grid, 3, 4, dtype)
    inputs = [torch.randn(2, 3, 10, 4, dtype=dtype, requires_grad=True) for _ in range(3)]
    results = []
    for backend in ("eager", "reference"):
        out = irpe.attention(*inputs, terms, backend=backend)
        wanted = [*inputs, *(t.table for t in terms)]
        results.append([out, *torch.autograd.grad(out.float().square().sum(), wanted)])
    near = 1e-5 if dtype == torch.float32 else 0.1
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=near, atol=near)
