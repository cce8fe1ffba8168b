"""RPEAttention and the encodings' modules, by themselves."""

import copy
import pickle

import pytest
import torch
from common import TILES
from oracles import attention as truth
from oracles import buckets as plain
from torch import nn

import irpe

F64 = torch.float64
SPECS = [
    "rpe-1.9-product-ctx-1-qkv",
    "rpe-1.9-product-ctx-0-qk",
    "rpe-1.9-cross-ctx-0-qkv",
    "rpe-2.0-euc-bias-0-qk",
    "rpe-1.9-cross-bias-1-k",
]


def layer_of(spec, **options):
    layer = irpe.RPEAttention(12, 2, spec, **{"dtype": F64, "prefix": 1, **options})
    for name, p in layer.named_parameters():
        if "lookup_table" in name:
            nn.init.normal_(p)
    return layer


def encodings_of(layer, spec):
    spec = irpe.parse(spec)
    made = []
    for on in "qkv":
        module = getattr(layer, f"rpe_{on}")
        if module is not None:
            for table, function in zip(module.parameters(), plain.buckets(spec), strict=True):
                made.append((f"bias_{on}" if spec.mode == "bias" else on, table, function))
    return made


@pytest.mark.cases(8)
@pytest.mark.parametrize("backend", ["auto", "reference", "eager", *TILES])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("spec", SPECS)
def test_layer_against_loops(spec, prefix, backend):
    layer = layer_of(spec, prefix=int(prefix > 0), backend=backend)
    L = 6 + prefix
    x = torch.randn(1, L, 12, dtype=F64, requires_grad=True)
    mask = torch.rand(L, L) > 0.3
    mask[1] = False
    where = [plain.grid(2, 3, prefix)]
    q, k, v = layer.qkv(x).view(1, L, 3, 2, 6).permute(2, 0, 3, 1, 4).unbind(0)
    full = mask.expand(1, 2, L, L)
    out = truth.attention(q, k, v, encodings_of(layer, spec), where, where, full)
    wanted = layer.proj(out.transpose(1, 2).reshape(1, L, 12))
    found = layer(x, irpe.Grid(2, 3, prefix=prefix), mask=mask)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    inputs = [x, *layer.parameters()]
    ours = torch.autograd.grad(found.square().sum(), inputs)
    theirs = torch.autograd.grad(wanted.square().sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_without_an_encoding_it_is_plain_attention():
    torch.manual_seed(1)
    layer = irpe.RPEAttention(12, 2, None, dtype=F64, prefix=1)
    assert (layer.rpe_q, layer.rpe_k, layer.rpe_v) == (None, None, None)
    other = nn.MultiheadAttention(12, 2, batch_first=True, dtype=F64)
    state = {"in_proj_weight": layer.qkv.weight, "in_proj_bias": layer.qkv.bias}
    other.load_state_dict(
        state | {f"out_{n}": p for n, p in layer.named_parameters() if n[:5] == "proj."}
    )
    x = torch.randn(2, 6, 12, dtype=F64)
    wanted, _ = other(x, x, x, need_weights=False)
    torch.testing.assert_close(layer(x, irpe.Grid(2, 3)), wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("spec", SPECS)
def test_fresh_tables_change_nothing(spec):
    layer, none = irpe.RPEAttention(12, 2, spec, prefix=1), irpe.RPEAttention(12, 2, None, prefix=1)
    none.load_state_dict({n: p for n, p in layer.state_dict().items() if "rpe_" not in n})
    x = torch.randn(2, 7, 12)
    grid = irpe.Grid(2, 3, prefix=1)
    torch.testing.assert_close(layer(x, grid), none(x, grid), rtol=1e-5, atol=1e-6)


def test_dropout_only_in_training():
    layer = layer_of(SPECS[0], attn_drop=0.5, proj_drop=0.5)
    x, grid = torch.randn(2, 7, 12, dtype=F64), irpe.Grid(2, 3, prefix=1)
    assert not torch.equal(layer(x, grid), layer(x, grid))
    layer.eval()
    assert torch.equal(layer(x, grid), layer(x, grid))
    other = layer_of(SPECS[0])
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x, grid), other(x, grid))


@pytest.mark.parametrize(
    ("spec", "shapes"),
    [
        (
            "rpe-1.9-product-ctx-1-qkv",
            {"rpe_q.lookup_table_weight": (1, 6, 50), "rpe_k.lookup_table_weight": (1, 6, 50)}
            | {"rpe_v.lookup_table_weight": (1, 50, 6)},
        ),
        ("rpe-1.9-product-ctx-0-v", {"rpe_v.lookup_table_weight": (2, 50, 6)}),
        ("rpe-20.0-euc-bias-0-k", {"rpe_k.lookup_table_bias": (2, 82)}),
        (
            "rpe-20.0-cross-ctx-1-k",
            {"rpe_k.rp_rows.lookup_table_weight": (1, 6, 82)}
            | {"rpe_k.rp_cols.lookup_table_weight": (1, 6, 82)},
        ),
    ],
)
def test_names_and_shapes_are_the_originals(spec, shapes):
    state = irpe.RPEAttention(12, 2, spec, prefix=1).state_dict()
    assert {n: tuple(p.shape) for n, p in state.items() if "rpe" in n} == shapes
    assert all((p == 0).all() for n, p in state.items() if "rpe" in n)
    rest = {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    assert set(state) - set(shapes) == rest
    bare = irpe.RPEAttention(12, 2, spec, prefix=0).state_dict()
    for name, shape in shapes.items():
        axis = 1 if "rpe_v" in name else -1
        assert bare[name].shape[axis] == shape[axis] - 1


@pytest.mark.parametrize("size", [(3, 4, 0), (3, 4, 1), (1, 5, 2)])
@pytest.mark.parametrize(
    "spec", ["rpe-1.9-product-ctx-0-qkv", "rpe-1.9-cross-ctx-1-qkv", "rpe-2.0-cross-bias-0-qk"]
)
def test_dense_call_is_the_originals(spec, size):
    """rpe_k(q * scale), rpe_q(k * scale) transposed and rpe_v(P), as in the authors' tutorial."""
    height, width, prefix = size
    spec = irpe.parse(spec)
    modules = irpe.build_rpe(spec, head_dim=6, num_heads=2, prefix=int(prefix), dtype=F64)
    for m in modules:
        for p in () if m is None else m.parameters():
            nn.init.normal_(p)
    L = prefix + height * width
    q, k, v = (torch.randn(2, 2, L, 6, dtype=F64) for _ in range(3))
    scale = 6**-0.5
    on_q, on_k, on_v = modules
    logits = (q * scale) @ k.mT
    logits = logits + on_k(q * scale, height=height, width=width)
    logits = logits + on_q(k * scale, height=height, width=width).transpose(-2, -1)
    p = logits.softmax(-1)
    out = p @ v
    if on_v is not None:
        out = out + on_v(p, height=height, width=width)
    terms = sum((m.terms(irpe.Grid(*size)) for m in modules if m is not None), ())
    wanted = irpe.attention(q, k, v, terms)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    dense = on_k(q * scale, height, width)
    assert dense.shape == ((1, 2, L, L) if spec.mode == "bias" else (2, 2, L, L))


def test_shared_bias_is_the_same_in_all_heads():
    on_k = irpe.build_rpe("rpe-1.9-product-bias-1-k", head_dim=6, num_heads=3, prefix=1, dtype=F64)[
        1
    ]
    nn.init.normal_(on_k.table)
    zero, v = torch.zeros(1, 3, 7, 6, dtype=F64), torch.eye(7, dtype=F64).expand(1, 3, 7, 7)
    p = irpe.attention(zero, zero, v, on_k.terms(irpe.Grid(2, 3, prefix=1)))
    assert torch.equal(p[:, 0], p[:, 1]) and torch.equal(p[:, 0], p[:, 2])
    assert p[0, 0].std() > 0.01
    torch.testing.assert_close(p.sum(-1), torch.ones(1, 3, 7, dtype=F64))


def test_per_head_tables_act_on_their_head():
    on_k = irpe.build_rpe("rpe-1.9-product-ctx-0-k", head_dim=6, num_heads=3, prefix=1, dtype=F64)[
        1
    ]
    q, k, v = (torch.randn(1, 3, 7, 6, dtype=F64) for _ in range(3))
    grid = irpe.Grid(2, 3, prefix=1)
    before = irpe.attention(q, k, v, on_k.terms(grid))
    with torch.no_grad():
        on_k.table[1].normal_()
    after = irpe.attention(q, k, v, on_k.terms(grid))
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
    assert not torch.allclose(after[:, 1], before[:, 1])


def test_half_turn_with_flipped_tables():
    """Tokens in reverse and tables in reverse: outputs in reverse (papers, D3.10)."""
    layer = layer_of("rpe-1.9-product-ctx-0-qkv", prefix=0)
    turned = copy.deepcopy(layer)
    with torch.no_grad():
        for name, p in turned.named_parameters():
            if "lookup_table" in name:
                p.copy_(p.flip(1 if "rpe_v" in name else 2))
    x, grid = torch.randn(1, 12, 12, dtype=F64), irpe.Grid(3, 4)
    found = turned(x.flip(1), grid)
    torch.testing.assert_close(found, layer(x, grid).flip(1), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(layer(x.flip(1), grid), layer(x, grid).flip(1))


def test_a_permutation_of_tokens_with_their_positions():
    """Attention with positions is equivariant: only where a token is counts, not its number."""
    layer = layer_of("rpe-1.9-cross-ctx-0-qkv", prefix=0)
    x, order = torch.randn(1, 12, 12, dtype=F64), torch.randperm(12)
    wanted = layer(x, irpe.Grid(3, 4))[:, order]
    found = layer(x[:, order], irpe.Grid(3, 4).select(order))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_a_smaller_image_is_a_masked_larger_one():
    layer = layer_of("rpe-1.9-product-ctx-1-qkv", prefix=1)
    inside = torch.cat(
        (torch.tensor([0]), (torch.arange(2)[:, None] * 4 + torch.arange(3) + 1).flatten())
    )
    x = torch.randn(1, 13, 12, dtype=F64)
    seen = torch.zeros(1, 1, 1, 13, dtype=torch.bool)
    seen[..., inside] = True
    large = layer(x, irpe.Grid(3, 4, prefix=1), mask=seen)[:, inside]
    small = layer(x[:, inside], irpe.Grid(2, 3, prefix=1))
    torch.testing.assert_close(large, small, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(copied):
    layer = layer_of("rpe-1.9-cross-ctx-0-qkv")
    x, grid = torch.randn(2, 7, 12, dtype=F64), irpe.Grid(2, 3, prefix=1)
    wanted = layer(x, grid)
    other = copied(layer)
    assert torch.equal(other(x, grid), wanted)
    with torch.no_grad():
        other.rpe_k.rp_rows.table.zero_()
    assert torch.equal(layer(x, grid), wanted) and not torch.equal(other(x, grid), wanted)


def test_one_layer_on_many_grids():
    """Forward passes on several grids, then one backward: the sum of separate gradients."""
    layer = layer_of("rpe-1.9-product-ctx-1-qkv")
    cases = [
        (irpe.Grid(2, 6, prefix=1), 13),
        (irpe.Grid(6, 2, prefix=1), 13),
        (irpe.Grid(3, 3, prefix=1), 10),
    ]
    inputs = [torch.randn(1, L, 12, dtype=F64) for _, L in cases]
    wanted = 0
    for (grid, _), x in zip(cases, inputs, strict=True):
        loss = layer(x, grid).square().sum()
        wanted = wanted + torch.autograd.grad(loss, layer.rpe_k.table)[0]
    loss = sum(layer(x, grid).square().sum() for (grid, _), x in zip(cases, inputs, strict=True))
    found = torch.autograd.grad(loss, layer.rpe_k.table)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_module_prints_what_it_is():
    text = repr(irpe.RPEAttention(12, 2, "rpe-1.9-cross-ctx-0-k", prefix=1))
    assert "rp_rows" in text and "rpe-1.9-cross-ctx-0-k" in text and "[2, 6, 8]" in text
