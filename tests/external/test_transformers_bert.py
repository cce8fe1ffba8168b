"""Whole BERTs of transformers 4.57.6 in ours, with random weights; skipped where it is absent."""

import pytest
import torch

from models.text import Bert, SpanFinder, released_options, released_weights

transformers = pytest.importorskip("transformers", reason='needs pip install -e ".[oracles]"')
if not transformers.__version__.startswith("4.57."):
    pytest.skip("transformers 4.57.6 has what is compared here", allow_module_level=True)

KINDS = ["absolute", "relative_key", "relative_key_query"]


def theirs(kind, model="BertForQuestionAnswering", **options):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=16, position_embedding_type=kind, **options,
    )  # fmt: skip
    made = getattr(transformers, model)(config).double().eval()
    for name, parameter in made.named_parameters():  # norms and biases start as 1 and 0
        torch.nn.init.normal_(parameter, mean=float("LayerNorm.weight" in name), std=0.3)
    return made, config.to_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_spans_and_gradients(kind):
    bert, config = theirs(kind)
    options = released_options(config)
    ours = SpanFinder(Bert(**options)).double().eval()
    ours.load_state_dict(released_weights(bert.state_dict(), options["encoding"]))
    x, types = torch.randint(40, (3, 13)), torch.randint(2, (3, 13))
    seen = torch.ones(3, 13, dtype=torch.bool)
    seen[1, 8:], seen[2, 2:] = False, False
    wanted = bert(x, attention_mask=seen.long(), token_type_ids=types)
    start, end = ours(x, types, seen)
    for found, other in ((start, wanted.start_logits), (end, wanted.end_logits)):
        torch.testing.assert_close(found[seen], other[seen], rtol=1e-9, atol=1e-10)
    w = torch.randn(3, 13, dtype=torch.float64)
    for starts, ends in ((start, end), (wanted.start_logits, wanted.end_logits)):
        ((starts * w)[seen].sum() + (ends * w.flip(0))[seen].sum()).backward()
    # Gradients by our names, through the same mapping.
    theirs_grads = {
        name: p.grad if p.grad is not None else torch.zeros_like(p)
        for name, p in bert.named_parameters()
    }
    mapped = released_weights(theirs_grads, options["encoding"])
    mine = {name: p.grad for name, p in ours.named_parameters()}
    assert mapped.keys() == mine.keys()
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, mapped[name], rtol=1e-8, atol=1e-9)
    tables = [n for n in mine if "table" in n or "learned" in n]
    assert len(tables) == (1 if kind == "absolute" else 2)
    assert all(mine[name].abs().max() > 1e-6 for name in tables)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_language_models_as_they_were_released(kind):
    """Heads of pre-training are left out, and older names of norms are known."""
    bert, config = theirs(kind, "BertForMaskedLM")
    released = {}
    for name, weight in bert.state_dict().items():
        for new, old in (("weight", "gamma"), ("bias", "beta")):
            name = name.replace(f"LayerNorm.{new}", f"LayerNorm.{old}")
        released[name] = weight
    released["bert.embeddings.position_ids"] = torch.arange(16)[None]
    options = released_options(config)
    ours = Bert(**options).double().eval()
    found = released_weights(released, options["encoding"])
    ours.load_state_dict({name.removeprefix("body."): w for name, w in found.items()})
    x = torch.randint(40, (2, 16))
    torch.testing.assert_close(ours(x), bert.bert(x)[0], rtol=1e-9, atol=1e-10)


def test_dropout_and_norms_are_theirs():
    _, config = theirs("absolute", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3)
    ours = Bert(**released_options(config))
    assert ours.drop.p == 0.2 and ours.blocks[0].drop.p == 0.2 and ours.blocks[0].attn.drop == 0.3
    assert ours.norm.eps == ours.blocks[1].norm2.eps == 1e-12
