"""Encodings against Hugging Face's transformers 4.57.6, the last with relative keys in BERT.

Skipped where it is absent, see the extra ``oracles``.
"""

import pytest
import torch

import irpe

transformers = pytest.importorskip("transformers", reason='needs pip install -e ".[oracles]"')
if not transformers.__version__.startswith("4.57."):
    pytest.skip("transformers 4.57.6 has what is compared here", allow_module_level=True)

H, D, L = 4, 8, 13
C = H * D


def tensors(length=L, dtype=torch.float32):
    return [torch.randn(2, H, length, D, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("length", [1, 13, 16])
@pytest.mark.parametrize(
    ("spec", "kind"), [("shaw,clip=15", "relative_key"), ("huang4,clip=15", "relative_key_query")]
)
def test_bert(spec, kind, length):
    """Outputs, probabilities and gradients of an encoder's attention, with padding."""
    from transformers.models.bert.modeling_bert import BertConfig, BertSelfAttention

    config = BertConfig(
        hidden_size=C, num_attention_heads=H, max_position_embeddings=16,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs = BertSelfAttention(config, position_embedding_type=kind).double()
    ours = irpe.RPEAttention(C, H, spec, prefix=0, dtype=torch.float64)
    table = ours.shaw.table_k if spec[:4] == "shaw" else ours.huang.table
    with torch.no_grad():
        for part, mine in ((ours.qkv.weight, "weight"), (ours.qkv.bias, "bias")):
            part.copy_(
                torch.cat([getattr(getattr(theirs, n), mine) for n in ("query", "key", "value")])
            )
        table.copy_(theirs.distance_embedding.weight.T)
        ours.proj.weight.copy_(torch.eye(C))
        ours.proj.bias.zero_()
    x = torch.randn(2, length, C, dtype=torch.float64, requires_grad=True)
    seen = torch.ones(2, 1, 1, length, dtype=torch.bool)
    seen[1, ..., 1 + length // 2 :] = False
    added = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -1e300)
    wanted, _ = theirs(x, added)
    found = ours(x, irpe.Sequence(length), mask=seen)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)
    w = torch.randn_like(wanted)
    mine = torch.autograd.grad((found * w).sum(), (x, table))
    other = torch.autograd.grad((wanted * w).sum(), (x, theirs.distance_embedding.weight))
    torch.testing.assert_close(mine[0], other[0], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(mine[1][0].T, other[1], rtol=1e-9, atol=1e-11)


def test_wav2vec2_bert_clips():
    """Its offsets are key - query: the table is Shaw's, turned round."""
    from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import (
        Wav2Vec2BertConfig,
        Wav2Vec2BertSelfAttention,
    )

    config = Wav2Vec2BertConfig(
        hidden_size=C, num_attention_heads=H, position_embeddings_type="relative_key",
        left_max_position_embeddings=3, right_max_position_embeddings=3, attention_dropout=0.0,
    )  # fmt: skip
    theirs = Wav2Vec2BertSelfAttention(config).double()
    x = torch.randn(2, L, C, dtype=torch.float64)
    wanted = theirs(x, output_attentions=True)[1]
    shaw = irpe.build("shaw,clip=3", dim=C, num_heads=H, dtype=torch.float64)["shaw"]
    with torch.no_grad():
        shaw.table_k.copy_(theirs.distance_embedding.weight.T.flip(-1))
    q, k = (m(x).view(2, L, H, D).transpose(1, 2) for m in (theirs.linear_q, theirs.linear_k))
    eye = torch.eye(L, dtype=torch.float64).expand(2, H, -1, -1)
    found = irpe.attention(q, k, eye, shaw.terms(irpe.Sequence(L)))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)


def test_roformer():
    from transformers.models.roformer.modeling_roformer import (
        RoFormerSelfAttention,
        RoFormerSinusoidalPositionalEmbedding,
    )

    table = RoFormerSinusoidalPositionalEmbedding(L, D)
    table._init_weight()
    q, k, _ = tensors()
    wanted = RoFormerSelfAttention.apply_rotary_position_embeddings(
        table(torch.Size((2, L)))[None, None], q, k
    )
    rope = irpe.build("rope", dim=C, num_heads=H)["rope"]
    for a, b in zip(rope.transform(q, k, irpe.Sequence(L)), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def llama(fraction=1.0, **options):
    config = transformers.LlamaConfig(
        hidden_size=C * 4, num_attention_heads=H, head_dim=D * 4, max_position_embeddings=64,
        **options,
    )  # fmt: skip
    config.partial_rotary_factor = fraction
    return config


@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_llama(base):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    q, k = (torch.randn(2, H, L, D * 4) for _ in range(2))
    where = torch.stack((torch.arange(L), torch.arange(L) * 3 + 7))
    cos, sin = LlamaRotaryEmbedding(llama(rope_theta=base))(q, where)
    wanted = apply_rotary_pos_emb(q, k, cos, sin)
    rope = irpe.build(f"rope,layout=half,base={base:.0f}", dim=C * 4, num_heads=H)["rope"]
    found = rope.transform(q, k, irpe.Sequence(L, positions=where))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("factor", [1.0, 2.0, 4.0, 8.0, 32.0])
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_scaled_frequencies(kind, factor, fraction):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = 64
    config = llama(fraction, rope_scaling=scaling)
    length = None
    if kind == "dynamic":  # its base grows with the length; at this one by our factor
        length = 64 * (2 * factor - 1) / factor
    wanted, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu", length)
    name = {"dynamic": "ntk"}.get(kind, kind)
    spec = irpe.parse(
        f"rope,scaling={name},factor={factor:g}{',original=64' * (kind == 'yarn')}"
        f"{',fraction=0.5' * (fraction == 0.5)}"
    )
    found, mine = spec.frequencies(D * 4)
    torch.testing.assert_close(found[0].float(), wanted, rtol=2e-6, atol=0)
    assert mine == pytest.approx(scale, rel=1e-12)


RELEASED = {
    "llama3": {"factor": 8.0, "original_max_position_embeddings": 32, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0},
    "llama3 other": {"factor": 32.0, "original_max_position_embeddings": 16,
                     "low_freq_factor": 0.5, "high_freq_factor": 3.0},
    "dynamic": {"factor": 2.0},
    "dynamic more": {"factor": 8.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0,
             "beta_slow": 2.0},
    "yarn factor": {"factor": 4.0, "original_max_position_embeddings": 64,
                    "attention_factor": 1.3},
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 32,
                 "short_factor": [1 + t / 9 for t in range(2 * D)],
                 "long_factor": [2 + t / 3 for t in range(2 * D)]},
    "longrope factor": {"attention_factor": 1.2, "factor": 1.0,
                        "original_max_position_embeddings": 32,
                        "short_factor": [1.0] * (2 * D), "long_factor": [3.0] * (2 * D)},
}  # fmt: skip


@pytest.mark.parametrize("length", [20, 64, 65, 300])
@pytest.mark.parametrize("name", RELEASED)
def test_scalings_of_released_models(name, length):
    """Frequencies and factor of transformers' own functions, to float32 rounding."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind, options = name.split()[0], RELEASED[name]
    config = llama(rope_scaling={"rope_type": kind, **options})
    if kind == "longrope":  # as in Phi-3: the factor is a ratio of two lengths
        config.original_max_position_embeddings = 32
        config.max_position_embeddings = 128
    wanted, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu", length)
    ours = {key: value for key, value in options.items() if not key.startswith("original")}
    if kind != "linear":
        ours["original"] = options.get("original_max_position_embeddings", 64)
    found = irpe.parse(
        ",".join(
            f"{key}={':'.join(map(repr, value)) if isinstance(value, list) else value}"
            for key, value in {"rope,scaling": kind, **ours}.items()
        )
    ).frequencies(D * 4, torch.tensor(float(length), dtype=torch.float64))
    torch.testing.assert_close(found[0][0].float(), wanted, rtol=3e-6, atol=0)
    assert found[1] == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (8, 20), (64, 1000), (16, 100)])
def test_t5_buckets(buckets, most, both):
    from transformers.models.t5.modeling_t5 import T5Attention

    sides = "" if both else ",bidirectional=0"
    length = 3 * most
    found, _ = irpe.bucket_ids(f"t5,buckets={buckets},max={most}{sides}", irpe.Sequence(length))
    relative = torch.arange(length) - torch.arange(length)[:, None]
    wanted = T5Attention._relative_position_bucket(relative, both, buckets, most)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("decoder", [True, False])
def test_t5_attention(decoder):
    """T5 does not scale logits; a scale of 1 says so. Its softmax is in float32."""
    from transformers.models.t5.modeling_t5 import T5Attention, T5Config

    config = T5Config(d_model=C, d_kv=D, num_heads=H, dropout_rate=0.0, is_decoder=decoder)
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).double().eval()
    x = torch.randn(2, 40, C, dtype=torch.float64)
    causal = torch.zeros(1, 1, 40, 40, dtype=torch.float64).masked_fill(
        ~torch.ones(40, 40, dtype=torch.bool).tril(), -1e300
    )
    places = torch.arange(40)
    wanted = theirs(x, mask=causal if decoder else None, cache_position=places)[0]
    t5 = irpe.build("t5,buckets=32,max=128", dim=C, num_heads=H, causal=decoder, dtype=x.dtype)[
        "t5"
    ]
    with torch.no_grad():
        t5.table.copy_(theirs.relative_attention_bias.weight.T)
    q, k, v = (m(x).view(2, 40, H, D).transpose(1, 2) for m in (theirs.q, theirs.k, theirs.v))
    terms = t5.terms(irpe.Sequence(40))
    out = irpe.attention(q, k, v, terms, is_causal=decoder, scale=1.0)
    found = theirs.o(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("heads", [1, 4, 8, 12, 20])
def test_bloom_slopes(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    from irpe.encodings.alibi import alibi_slopes

    bias = build_alibi_tensor(torch.ones(1, 5), heads, torch.float64)
    torch.testing.assert_close(
        bias[:, 0, 1], torch.tensor(alibi_slopes(heads), dtype=torch.float64)
    )
