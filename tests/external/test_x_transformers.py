"""Encodings against x-transformers; skipped where it is absent, see the extra ``oracles``."""

import pytest
import torch

import irpe

pytest.importorskip("x_transformers", reason='needs pip install -e ".[oracles]"')

H, D, L = 2, 16, 65


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize(("given", "options"), [
    ("", {}), (",base=500", {"base": 500}),
    (",scaling=linear,factor=4", {"interpolation_factor": 4.0}),
    (",scaling=ntk,factor=4", {"base_rescale_factor": 4.0}),
])  # fmt: skip
def test_rotary(given, options, fraction):
    from x_transformers.x_transformers import RotaryEmbedding, apply_rotary_pos_emb

    q, k = torch.randn(2, H, L, D), torch.randn(2, H, L, D)
    freqs, scale = RotaryEmbedding(round(D * fraction), **options).forward_from_seq_len(L)
    part = "" if fraction == 1.0 else ",fraction=0.5"
    spec = f"rope{given.split(',scaling')[0]}{part}"
    if "scaling" in given:
        spec += ",scaling" + given.split(",scaling")[1]
    rope = irpe.build(spec, dim=H * D, num_heads=H)["rope"]
    for x, y in zip((q, k), rope.transform(q, k, irpe.Sequence(L)), strict=True):
        torch.testing.assert_close(y, apply_rotary_pos_emb(x, freqs, scale), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 16, 40])
def test_alibi(heads):
    from x_transformers.x_transformers import AlibiPositionalBias

    theirs = AlibiPositionalBias(heads)
    alibi = irpe.build("alibi", dim=8 * heads, num_heads=heads)["alibi"]
    (term,) = alibi.terms(irpe.Sequence(9))
    far = term.buckets.distances(torch.device("cpu"), torch.float64)
    torch.testing.assert_close((term.table[..., None] * far).float(), theirs(9, 9))
    where = torch.tensor([[0, 3, 4, 9], [5, 6, 7, 20]])
    (term,) = alibi.terms(irpe.Sequence(4, positions=where))
    far = term.buckets.distances(torch.device("cpu"), torch.float64).unsqueeze(1)
    found = (term.table[..., None] * far).float()
    torch.testing.assert_close(found, theirs.forward_custom_pos(where))


def test_t5_buckets():
    from x_transformers.x_transformers import RelativePositionBias

    relative = torch.arange(300) - torch.arange(300)[:, None]
    for causal in (True, False):
        theirs = RelativePositionBias._relative_position_bucket(
            relative, causal=causal, num_buckets=32, max_distance=128
        )
        sides = ",bidirectional=0" if causal else ""
        found, _ = irpe.bucket_ids(f"t5,buckets=32,max=128{sides}", irpe.Sequence(300))
        assert torch.equal(found, theirs)
