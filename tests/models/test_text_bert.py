"""BERT and the names of released weights; against transformers in tests/external."""

import pytest
import torch
from released import released_names

import irpe
from models.text import Bert, SpanFinder, released_options, released_weights

SMALL = {"vocab_size": 30, "dim": 16, "depth": 2, "num_heads": 2, "hidden": 24}
SPECS = {"learned,length=12": "absolute", "shaw,clip=11": "relative_key",
         "huang4,clip=11": "relative_key_query"}  # fmt: skip


@pytest.mark.parametrize(("spec", "kind"), SPECS.items())
def test_there_and_back(spec, kind):
    torch.manual_seed(0)
    one, two = (SpanFinder(Bert(**SMALL, encoding=spec)).eval() for _ in range(2))
    config = {
        "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": 12, "position_embedding_type": kind,
        "hidden_act": "gelu", "model_type": "bert",
    }  # fmt: skip
    assert released_options(config) == {**SMALL, "encoding": spec}
    two.load_state_dict(released_weights(released_names(one, kind), spec))
    x = torch.randint(30, (2, 9))
    for a, b in zip(one(x), two(x), strict=True):
        assert torch.equal(a, b)


def test_longer_texts_than_trained_on():
    """Relative positions are clipped; absolute ones end."""
    x = torch.randint(30, (1, 20))
    for spec in list(SPECS)[1:]:
        assert Bert(**SMALL, encoding=spec)(x).shape == (1, 20, 16)
    with pytest.raises(irpe.IrpeError, match="0 to 11.*0 to 19"):
        Bert(**SMALL, encoding="learned,length=12")(x)


def test_a_released_body_takes_a_further_encoding():
    torch.manual_seed(0)
    bert, x = Bert(**SMALL, encoding="learned,length=12").eval(), torch.randint(30, (1, 9))
    before = bert(x)
    bert.attach("huang4,clip=11")
    torch.testing.assert_close(bert(x), before)


def test_bad_input():
    with pytest.raises(irpe.IrpeError, match="'rotary'.*relative_key_query"):
        released_options({"position_embedding_type": "rotary"})
    with pytest.raises(irpe.IrpeError, match="'relu' is not gelu"):
        released_options({"hidden_act": "relu"})
    with pytest.raises(irpe.IrpeError, match=r"h\.0\.attn\.c_attn"):
        released_weights({"h.0.attn.c_attn.weight": torch.zeros(1)}, "shaw,clip=3")
    name = "bert.encoder.layer.0.attention.self.{}.weight"
    with pytest.raises(irpe.IrpeError, match="without all of query, key and value"):
        released_weights({name.format("query"): torch.zeros(1)}, "shaw,clip=3")
