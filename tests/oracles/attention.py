"""Attention with image encodings as loops over samples, heads, queries and keys."""

import torch


def attention(q, k, v, encodings, queries, keys, mask=None, is_causal=False, scale=None):
    """Eq. 13 to 17 of Wu et al., with the released code's scaling.

    Args:
        q: ``[B, H, L, D]``.
        k, v: ``[B, G, S, D]``, each head of them for H / G heads of q.
        encodings: tuples (on, table, function): on is "bias_q", "bias_k", "q", "k" or "v"; table
            as the parameter; function takes (drow, dcolumn), for
            videos (dframe, drow, dcolumn).
        queries, keys: for each sample, the positions (row, column) or (frame, row,
            column); None for a prefix token,
            which puts its pairs into the last bucket.
        mask: bool or additive, of the full shape ``[B, H, L, S]``.
    """
    B, H, L, D = q.shape
    G, S = k.shape[1:3]
    scale = D**-0.5 if scale is None else scale
    samples = []
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            for i in range(L):
                logits, seen = [], []
                for j in range(S):
                    hidden = is_causal and j > i + S - L
                    added = 0.0
                    if mask is not None and mask.dtype == torch.bool:
                        hidden = hidden or not bool(mask[b, h, i, j])
                    elif mask is not None:
                        hidden = hidden or float(mask[b, h, i, j].detach()) == float("-inf")
                        added = mask[b, h, i, j]
                    if hidden:
                        continue
                    logit = scale * _dot(q[b, h, i], k[b, g, j]) + added
                    for on, table, function in encodings:
                        head = table[h if table.shape[0] > 1 else 0]
                        if on == "bias_k":
                            logit = logit + head[_bucket(function, queries[b][i], keys[b][j])]
                        elif on == "bias_q":
                            logit = logit + head[_bucket(function, keys[b][j], queries[b][i])]
                        elif on == "k":
                            n = _bucket(function, queries[b][i], keys[b][j])
                            logit = logit + scale * _dot(q[b, h, i], head[:, n])
                        elif on == "q":
                            n = _bucket(function, keys[b][j], queries[b][i])
                            logit = logit + scale * _dot(k[b, g, j], head[:, n])
                    logits.append(logit)
                    seen.append(j)
                row = q.new_zeros(v.shape[-1])
                if seen:
                    weights = torch.stack(logits).exp() / torch.stack(logits).exp().sum()
                    for p, j in zip(weights, seen, strict=True):
                        value = v[b, g, j]
                        for on, table, function in encodings:
                            if on == "v":
                                head = table[h if table.shape[0] > 1 else 0]
                                n = _bucket(function, queries[b][i], keys[b][j])
                                value = value + head[n]
                        row = row + p * value
                samples.append(row)
    return torch.stack(samples).view(B, H, L, -1)


def _bucket(function, first, second):
    if first is None or second is None:
        return -1
    return function(*(a - b for a, b in zip(first, second, strict=True)))


def _dot(x, y):
    return (x * y).sum()
