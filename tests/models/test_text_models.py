"""Models of text: every encoding, caches, the heads of a bidirectional body, bad input."""

import copy
import pickle

import pytest
import torch
from models_text import AT_INPUT, BY_LENGTH, F64, IN_ATTENTION, SPECS, V, model, tokens
from torch.testing import assert_close

import irpe
from models.text import Body, Cache, CausalLM, Classifier, SpanFinder, generate

GAPS = torch.tensor([0, 1, 2, 5, 6, 11, 12, 13, 30, 31, 40])


def by_layers(lm, x, spec, positions=None):
    """The same model on ``irpe.RPEAttention``, block by block."""
    body, length = lm.body, x.shape[1]
    where = irpe.Sequence(length, positions=positions)
    y = body.embedding(x) * body.dim**0.5
    inner = spec if spec in IN_ATTENTION else None
    y = irpe.encodings_of(body.at_input).embed(y, where)
    for block in body.blocks:
        layer = irpe.RPEAttention(16, 2, inner, prefix=0, causal=body.causal, dtype=F64)
        layer.load_state_dict(block.attn.state_dict() | body.for_all.state_dict())
        y = y + layer(block.norm1(y), where)
        hidden = block.mlp["fc2"](torch.nn.functional.gelu(block.mlp["fc1"](block.norm2(y))))
        y = y + hidden
    return body.norm(y) @ body.embedding.weight.T


@pytest.mark.parametrize("spec", SPECS)
def test_the_layers_are_those_of_irpe(spec):
    lm, x = model(spec), tokens(length=11)
    own = torch.stack([GAPS, GAPS + 7, GAPS * 1])
    for positions in (None, GAPS, own):
        assert_close(lm(x, positions), by_layers(lm, x, spec, positions), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("spec", SPECS)
def test_every_parameter_has_a_gradient(spec):
    lm, x = model(spec), tokens(length=11)
    lm(x, GAPS).logsumexp(-1).mean().backward()
    for name, parameter in lm.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


# --- caches ---------------------------------------------------------------------------------------


def in_pieces(lm, x, sizes, positions=None, state=None):
    state, found, at = Cache() if state is None else state, [], 0
    for size in sizes:
        given = None if positions is None else positions[..., at : at + size]
        logits, state = lm(x[:, at : at + size], given, state)
        found.append(logits)
        at += size
    return torch.cat(found, 1), state


@pytest.mark.cases(7)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("spec", SPECS)
def test_cached_decoding_is_the_full_forward(spec, grad):
    lm, x = model(spec), tokens()
    with torch.set_grad_enabled(grad):
        full = lm(x)
        for sizes in ([21], [1] * 21, [9, 1, 1, 7, 3]):
            found, state = in_pieces(lm, x, sizes)
            assert_close(found, full, rtol=1e-10, atol=1e-11)
        parts = [part for kept in state.layers for part in kept if part is not None]
        assert {part.shape[-2] for part in parts} == {21} and {len(parts)} <= {2, 4, 6}
        assert not any(part.requires_grad for part in parts)


@pytest.mark.parametrize("spec", BY_LENGTH)
def test_a_cache_where_the_length_decides(spec):
    """All keys turn by the frequencies of the text so far, those in the cache too."""
    lm, x = model(spec, depth=1), tokens(batch=2, length=20)
    with torch.no_grad():
        _, state = lm(x[:, :3], state=Cache())
        for n in range(4, 21):
            found, state = lm(x[:, n - 1 : n], state=state)
            assert_close(found[:, 0], lm(x[:, :n])[:, -1], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("spec", SPECS)
def test_cached_decoding_at_explicit_positions(spec):
    """Positions with gaps, different for each text, and continued after the last given one."""
    lm, x = model(spec), tokens(length=13)
    whole = torch.cat((GAPS, torch.tensor([41, 42])))
    own = torch.stack([whole, whole + 3, whole + 9])
    with torch.no_grad():
        for positions in (whole, own):
            full = lm(x, positions)
            found, state = in_pieces(lm, x, [4, 1, 6], positions[..., :11])
            last, _ = lm(x[:, 11:], state=state)
            assert_close(torch.cat((found, last), 1), full, rtol=1e-10, atol=1e-11)
        # Positions for all texts first, then for each its own.
        first, state = in_pieces(lm, x, [5], whole[:5])
        rest, _ = lm(x[:, 5:], own[:, 5:], state)
        mixed = torch.cat((whole[:5].expand(3, -1), own[:, 5:]), 1)
        assert_close(torch.cat((first, rest), 1), lm(x, mixed), rtol=1e-10, atol=1e-11)


def test_a_state_is_a_value():
    lm, x = model("pia"), tokens()
    with torch.no_grad():
        _, state = lm(x[:, :8], state=Cache())
        first, _ = lm(x[:, 8:12], state=state)
        lm(x[:, 3:9], state=state)
        assert torch.equal(lm(x[:, 8:12], state=state)[0], first)


@pytest.mark.parametrize("spec", SPECS)
def test_no_token_sees_a_later_one(spec):
    lm, x = model(spec), tokens()
    changed = x.clone()
    changed[:, 12] = (x[:, 12] + 1) % V
    before, after = lm(x), lm(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert (before[:, 12:] - after[:, 12:]).abs().amax(-1).min() > 1e-6


def test_generation():
    lm, x = model("rope"), tokens(batch=2, length=4)
    greedy = generate(lm, x, 6, temperature=0)
    known = x
    for _ in range(6):
        known = torch.cat((known, lm(known)[:, -1:].argmax(-1)), 1)
    assert torch.equal(torch.cat((x, greedy), 1), known)
    drawn = [generate(lm, x, 6, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    _, state = lm(x[:, :3], state=Cache())
    assert torch.equal(generate(lm, x[:, 3:], 6, temperature=0, state=state), greedy)
    assert generate(lm, x, 0).shape == (2, 0)


# --- decoding of several texts -------------------------------------------------------------------


def padded(texts):
    """Texts with padding on the left, and which tokens are no padding."""
    length = max(len(text) for text in texts)
    rows = [torch.cat((torch.full((length - len(text),), 3), text)) for text in texts]
    seen = torch.tensor([[i >= length - len(text) for i in range(length)] for text in texts])
    return torch.stack(rows), seen


TEXTS = [torch.arange(1, 8), torch.arange(9, 11), torch.arange(4, 9)]


@pytest.mark.parametrize("spec", SPECS)
def test_texts_padded_on_the_left_are_as_alone(spec):
    lm = model(spec)
    x, seen = padded(TEXTS)
    with torch.no_grad():
        together, state = lm(x, state=Cache(), seen=seen)
        more, _ = lm(x[:, :3], state=state)
        for row, text in enumerate(TEXTS):
            alone, own = lm(text[None], state=Cache())
            assert_close(together[row, -len(text) :], alone[0], rtol=1e-10, atol=1e-11)
            assert_close(
                more[row], lm(x[row : row + 1, :3], state=own)[0][0], rtol=1e-10, atol=1e-11
            )
        found = generate(lm, x, 6, temperature=0, seen=seen)
    for row, text in enumerate(TEXTS):
        assert torch.equal(found[row], generate(lm, text[None], 6, temperature=0)[0])


@pytest.mark.cases(6)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("spec", [*SPECS, *BY_LENGTH])
def test_a_state_in_another_order(spec, grad):
    lm = model(spec)
    x, seen = padded(TEXTS)
    with torch.set_grad_enabled(grad):
        for given, mask in ((x, None), (x, seen)):
            _, state = lm(given, state=Cache(), seen=mask)
            for order in ([2, 0, 1], [1, 1], [0, 2, 2, 2, 1]):
                chosen = torch.tensor(order)
                found, _ = lm(x[chosen, :2], state=state.reorder(chosen))
                own = None if mask is None else mask[chosen]
                _, again = lm(given[chosen], state=Cache(), seen=own)
                assert_close(found, lm(x[chosen, :2], state=again)[0], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("spec", SPECS)
def test_texts_packed_into_a_row(spec):
    """Positions start again, and a mask keeps the texts apart."""
    lm = model(spec)
    row = torch.cat(TEXTS)[None]
    number = torch.cat([torch.full_like(text, n) for n, text in enumerate(TEXTS)])
    positions = torch.cat([torch.arange(len(text)) for text in TEXTS])
    apart = (number[:, None] == number)[None]
    with torch.no_grad():
        found = lm(row, positions, mask=apart)[0]
        by_cache, _ = lm(row, positions, Cache(), mask=apart)
        assert torch.equal(found, by_cache[0])
        for part, text in zip(found.split([len(t) for t in TEXTS]), TEXTS, strict=True):
            assert_close(part, lm(text[None])[0], rtol=1e-10, atol=1e-11)
        with pytest.raises(irpe.IrpeError, match="do not increase .* need a mask"):
            lm(row, positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_texts_and_slopes(dtype):
    """In 16 bits causal ALiBi may take extra channels, which need positions that increase."""
    lm = model("alibi").to(dtype)
    row = torch.cat(TEXTS)[None]
    number = torch.cat([torch.full_like(text, n) for n, text in enumerate(TEXTS)])
    positions = torch.cat([torch.arange(len(text)) for text in TEXTS])
    with torch.no_grad():
        found = lm(row, positions, mask=(number[:, None] == number)[None])[0]
        for part, text in zip(found.split([len(t) for t in TEXTS]), TEXTS, strict=True):
            exact = model("alibi").to(dtype).double()(text[None])[0]
            error, plain = ((x.double() - exact).abs().max() for x in (part, lm(text[None])[0]))
            assert error <= 3 * plain + 4 * torch.finfo(dtype).eps


@pytest.mark.cases(1)
@pytest.mark.parametrize("spec", [*SPECS, *BY_LENGTH])
def test_compiled_steps_are_two_graphs(spec):
    spec = "learned,length=100" if spec == "learned,length=64" else spec
    lm, x, graphs = model(spec), torch.randint(0, V, (2, 100)), []
    x[0, :2] = 3
    seen = torch.ones(2, 5, dtype=torch.bool)
    seen[0, :2] = False

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for own in (None, seen):
        torch._dynamo.reset()
        graphs.clear()
        step = torch.compile(lambda x, state: lm(x, state=state), backend=counted, fullgraph=True)
        with torch.no_grad():
            _, state = lm(x[:, :5], state=Cache(), seen=own)
            eager = state
            for i in range(5, 100 if own is None else 20):
                found, state = step(x[:, i : i + 1], state)
                wanted, eager = lm(x[:, i : i + 1], state=eager)
                assert_close(found, wanted, rtol=1e-9, atol=1e-10)
        assert 1 <= len(graphs) <= 2


# --- encodings ------------------------------------------------------------------------------------


def test_copies():
    """T5's table is one for all layers, and stands in the state once."""
    lm, x = model("t5,buckets=8,max=20"), tokens()
    names = [name for name in lm.state_dict() if "t5" in name]
    assert names == ["body.for_all.t5.table"]
    before = lm(x)
    for other in (
        copy.deepcopy(lm),
        pickle.loads(pickle.dumps(lm)),
        model("t5,buckets=8,max=20", 5),
    ):
        other.load_state_dict(lm.state_dict())
        assert torch.equal(other(x), before)
    with torch.no_grad():
        lm.body.for_all.t5.table.zero_()
    assert (lm(x) - before).abs().max() > 1e-3


def test_an_output_layer_of_its_own():
    one, other = model("rope"), model("rope", tied=False)
    added = set(other.state_dict()) - set(one.state_dict())
    assert added == {"head.weight"}
    x = tokens()
    other.load_state_dict({**one.state_dict(), "head.weight": one.body.embedding.weight})
    assert_close(other(x), one(x))


@pytest.mark.parametrize("spec", ["huang4,clip=3", "shaw,clip=3", "huang1,clip=3", "t5"])
def test_a_neutral_encoding_joins_a_trained_model(spec):
    lm, x = model("learned,length=64"), tokens()
    before = lm(x)
    lm.body.attach(spec)
    assert_close(lm(x), before, rtol=1e-12, atol=1e-12)
    both = CausalLM(V, f"learned,length=64 + {spec}", dim=16, depth=2, num_heads=2).double()
    both.load_state_dict(lm.state_dict())
    assert torch.equal(both(x), lm(x))
    lm(x).logsumexp(-1).mean().backward()
    added = [p for n, p in lm.named_parameters() if "learned" in n or "table" in n]
    assert len(added) >= 2 and all(p.grad.abs().max() > 0 for p in added)


@pytest.mark.parametrize("spec", SPECS)
def test_tables_do_not_decay(spec):
    lm = model(spec)
    tables = lm.no_weight_decay()
    assert tables <= {name for name, _ in lm.named_parameters()}
    assert bool(tables) == (spec is not None and spec[:3] in ("t5,", "sha", "hua", "lea"))


@pytest.mark.parametrize("spec", ["rope", "alibi", "huang4,clip=3", "shaw,clip=3", "t5", "pia"])
def test_shifted_positions(spec):
    """Logits do not change for encodings of distances; sinusoids in attention change them."""
    lm, x = model(spec), tokens()
    moved = (lm(x, torch.arange(21) + 500) - lm(x)).abs().max()
    assert moved > 1e-3 if spec == "pia" else moved < 1e-9
    if spec == "rope":
        lm = lm.float()
        moved = (lm(x, torch.arange(21) + 1000) - lm(x)).abs().max()
        assert moved < 1e-4


def test_every_chunk_sees_all_earlier_ones():
    """Gaps between positions are no borders: a change in the first chunk reaches the last one."""
    chunks = torch.cat([torch.arange(4) + begin for begin in (0, 40, 44, 60)])
    for spec in SPECS:
        lm, x = model(spec), tokens(length=16)
        changed = x.clone()
        changed[:, 1] = (x[:, 1] + 1) % V
        assert (lm(x, chunks) - lm(changed, chunks))[:, 12:].abs().amax(-1).min() > 1e-9, spec


@pytest.mark.parametrize("given", ["gaps", "each its own", "cached"])
def test_alibi_counts_positions_and_not_places(given):
    """With no query, shares are those of -slope (p_i - p_j) alone."""
    attn = model("alibi", depth=1).body.blocks[0].attn
    with torch.no_grad():
        attn.qkv.weight[:16], attn.qkv.bias[:16] = 0, 0
        attn.proj.weight.copy_(torch.eye(16))
        attn.proj.bias.zero_()
    x = torch.randn(3, 11, 16, dtype=F64)
    own = torch.stack([GAPS, GAPS + 7, 3 * GAPS]) if given == "each its own" else GAPS.expand(3, -1)
    where = irpe.Sequence(11, positions=own if given == "each its own" else GAPS)
    with torch.no_grad():
        if given == "cached":
            first, last = GAPS[:6], GAPS[6:]
            before = irpe.Sequence(6, positions=first)
            part, kept = attn(x[:, :6], before, before)
            here = irpe.Sequence(5, positions=last)
            among = irpe.Sequence(5, positions=last, keys=GAPS)
            out = torch.cat((part, attn(x[:, 6:], here, among, kept)[0]), 1)
        else:
            out, _ = attn(x, where, where)
        values = attn.qkv(x)[..., 32:].unflatten(-1, (2, 8))
    for b in range(3):
        for h, slope in enumerate((2.0**-4, 2.0**-8)):
            for i in range(11):
                far = (own[b, i] - own[b, : i + 1]).double()
                shares = (-slope * far).softmax(0)
                wanted = shares @ values[b, : i + 1, h]
                assert_close(out[b, i].unflatten(-1, (2, 8))[h], wanted, rtol=1e-10, atol=1e-11)


def test_absolute_positions_count():
    for spec in AT_INPUT:
        lm, x = model(spec), tokens()
        assert (lm(x, torch.arange(21) + 5) - lm(x)).abs().max() > 1e-3


# --- heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_classifier_and_spans_do_not_see_padding(spec):
    torch.manual_seed(0)
    options = {"dim": 16, "depth": 2, "num_heads": 2, "encoding": spec}
    x, seen = tokens(), torch.ones(3, 21, dtype=torch.bool)
    seen[1, 13:], seen[2, 1:] = False, False
    changed = torch.where(seen, x, (x + 3) % V)
    types = torch.randint(2, x.shape)
    classifier = Classifier(Body(V, **options), 5).double()
    spans = SpanFinder(Body(V, types=2, **options)).double()
    for made in (classifier, spans):
        for name, parameter in made.named_parameters():
            if "table" in name:
                torch.nn.init.normal_(parameter)
    assert classifier(x, seen).shape == (3, 5)
    assert_close(classifier(x, seen), classifier(changed, seen), rtol=1e-10, atol=1e-12)
    assert_close(classifier(x, seen)[1], classifier(x[1:2, :13])[0], rtol=1e-10, atol=1e-12)
    for one, other in zip(spans(x, types, seen), spans(changed, types, seen), strict=True):
        assert one.shape == (3, 21)
        assert_close(one, other, rtol=1e-10, atol=1e-12)
        assert one.softmax(-1)[~seen].max() == 0
    # Both directions count, and so do the types.
    swapped = x.clone()
    swapped[:, -1] = (x[:, -1] + 1) % V
    assert (spans(x, types)[0] - spans(swapped, types)[0])[:, 0].abs().max() > 1e-6
    assert (spans(x, types)[0] - spans(x, 1 - types)[0]).abs().max() > 1e-6


# --- bad input ------------------------------------------------------------------------------------


def cached(spec="rope", batch=3, **options):
    return model(spec, **options)(tokens(batch=batch, length=5), state=Cache())[1]


BAD = {
    "another batch": (lambda: model("rope")(tokens(batch=2), state=cached()), "3 texts.*2, 21"),
    "another model": (
        lambda: model("rope")(tokens(), state=cached(depth=1)), "1 blocks.*has 2"
    ),
    "table too short": (
        lambda: model("learned,length=16")(tokens()), "0 to 15.*0 to 20.*interpolate"
    ),
    "table too short for a cache": (
        lambda: model("learned,length=6")(tokens(length=2), state=cached("learned,length=6")),
        "0 to 5.*5 to 6",
    ),
    "positions fall": (
        lambda: model("rope")(tokens(length=3), torch.tensor([0, 2, 1])), "do not increase"
    ),
    "positions stand": (
        lambda: model("rope")(tokens(length=2), torch.tensor([3, 3])), "do not increase"
    ),
    "positions before the cache's": (
        lambda: model("rope")(tokens(length=1), torch.tensor([4]), cached()), "not increase.*after"
    ),
    "positions of another length": (
        lambda: model("rope")(tokens(length=3), torch.arange(4)), "length=3.*4"
    ),
    "no batch": (lambda: model("rope")(tokens()[0]), r"integers \[B, L\].*\[21\]"),
    "no tokens": (lambda: model("rope")(tokens()[:, :0]), r"\[3, 0\]"),
    "not integers": (lambda: model("rope")(tokens().double()), "float64"),
    "memory with positions": (
        lambda: model("pia")(tokens(), torch.arange(21), model("pia").memory(8)), "must be None"
    ),
    "memory at input": (lambda: model("sinusoidal").memory(8), "pia or rope"),
    "no block": (lambda: model("pia").memory(0), "block=0"),
    "unknown spec": (lambda: model("ropee"), "'ropee'"),
    "for images": (lambda: model("rope-axial"), "rope-axial is for images"),
    "twice": (lambda: model("rope + rope,layout=half"), "'rope' already"),
    "odd channels": (lambda: model("rope", dim=6, num_heads=2), "head_dim|even"),
    "heads": (lambda: model("rope", num_heads=3), "dim=16.*num_heads=3"),
    "temperature": (lambda: generate(model("rope"), tokens(), 2, temperature=-1), "-1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, message = BAD[name]
    with pytest.raises(irpe.IrpeError, match=message):
        call()
