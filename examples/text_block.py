"""A causal text layer with rotary positions, and decoding with a cache of keys.

    python examples/text_block.py            (needs nothing but torch)

Expect two differences near 1e-7: decoding token by token with a cache gives the outputs of the
whole text, and shifting all positions changes nothing, since only offsets count.
"""

import torch
from torch import nn

import irpe

DIM, HEADS = 64, 4
torch.manual_seed(0)
spec = "rope"  # or "alibi", "t5", "shaw,clip=16", "huang4,clip=16"


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        for name, encoding in irpe.build(spec, dim=DIM, num_heads=HEADS, causal=True).items():
            setattr(self, name, encoding)

    def forward(self, x, text, cache=None):
        """Return the output for x [B, L, C] and the extended cache of keys and values."""
        encodings = irpe.encodings_of(self)
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        # Keys are rotated once, by their own positions; the cache holds rotated keys.
        own = irpe.Sequence(x.shape[1], positions=text.positions(x.device)[0].squeeze(-1))
        q, k = encodings.transform(q, k, own)
        if cache is not None:
            k, v = torch.cat((cache[0], k), 2), torch.cat((cache[1], v), 2)
        y = irpe.attention(
            q, k, v, encodings.terms(text), is_causal=True, scale=(DIM // HEADS) ** -0.5
        )
        return self.out(y.transpose(1, 2).flatten(2)), (k, v)


layer, x = Attention(), torch.randn(2, 12, DIM)
with torch.no_grad():
    whole, _ = layer(x, irpe.Sequence(12))
    cache, steps = None, []
    for n in range(12):  # one query, at position n, sees keys 0 to n
        text = irpe.Sequence(1, positions=torch.tensor([n]), keys=torch.arange(n + 1))
        y, cache = layer(x[:, n : n + 1], text, cache)
        steps.append(y)
    print(f"token by token against at once: {(torch.cat(steps, 1) - whole).abs().max():.0e}")
    moved, _ = layer(x, irpe.Sequence(12, positions=torch.arange(100, 112)))
    print(f"the same text 100 tokens later: {(moved - whole).abs().max():.0e}")
