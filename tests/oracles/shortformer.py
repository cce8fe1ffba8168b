"""A language model with position-infused attention and a memory, as loops over tokens.

Press, Smith, Lewis, Shortformer (ACL 2021), section 5: the memory of a layer is its inputs of the
block before, after the norm; the remembered tokens have positions 0 to m - 1, the block m and up.
"""

import math

import torch
import torch.nn.functional as F

from .text import sinusoid


def logits(w, tokens, heads, block, size, form="fairseq"):
    """``[T, V]`` from weights by name and a list of tokens."""
    dim = w["body.embedding.weight"].shape[1]
    depth = sum(name.endswith("attn.qkv.weight") for name in w)
    memories, found = [[] for _ in range(depth)], []
    for start in range(0, len(tokens), block):
        xs = [w["body.embedding.weight"][t] * dim**0.5 for t in tokens[start : start + block]]
        for layer in range(depth):
            xs, ys = _block(w, f"body.blocks.{layer}.", xs, memories[layer], heads, form)
            memories[layer] = [y.detach() for y in ys[max(len(ys) - size, 0) :]]
        found += [w["body.embedding.weight"] @ _norm(w, "body.norm", x) for x in xs]
    return torch.stack(found)


def _block(w, at, xs, memory, heads, form):
    ys = [*memory, *(_norm(w, at + "norm1", x) for x in xs)]
    on_q, on_k, on_v = w[at + "attn.qkv.weight"].chunk(3)
    b_q, b_k, b_v = w[at + "attn.qkv.bias"].chunk(3)
    dim = len(b_q)
    places = [torch.tensor(sinusoid(j, dim, form), dtype=b_q.dtype) for j in range(len(ys))]
    ks = [on_k @ (y + p) + b_k for y, p in zip(ys, places, strict=True)]
    vs = [on_v @ y + b_v for y in ys]
    out = []
    for number, x in enumerate(xs):
        own = len(memory) + number
        q = on_q @ (ys[own] + places[own]) + b_q
        mixed = []
        for h in range(heads):
            part = slice(h * dim // heads, (h + 1) * dim // heads)
            scores = [q[part] @ ks[j][part] / math.sqrt(dim // heads) for j in range(own + 1)]
            shares = torch.stack(scores).softmax(0)
            mixed.append(sum(share * vs[j][part] for j, share in enumerate(shares)))
        x = x + w[at + "attn.proj.weight"] @ torch.cat(mixed) + w[at + "attn.proj.bias"]
        hidden = w[at + "mlp.fc1.weight"] @ _norm(w, at + "norm2", x) + w[at + "mlp.fc1.bias"]
        out.append(x + w[at + "mlp.fc2.weight"] @ F.gelu(hidden) + w[at + "mlp.fc2.bias"])
    return out, ys


def _norm(w, at, x):
    centred = x - x.mean()
    return centred / (centred.square().mean() + 1e-5).sqrt() * w[at + ".weight"] + w[at + ".bias"]
