"""The gather of ``irpe.lookup`` and its adjoint, by loops."""

import torch


def _places(ids, batch, heads):
    """(b, h, i, j, n) for all batches, heads and pairs."""
    numbers = ids.tolist()
    for b in range(batch):
        own = numbers[b if ids.shape[0] > 1 else 0] if ids.dim() == 3 else numbers
        for h in range(heads):
            for i, row in enumerate(own):
                for j, n in enumerate(row):
                    yield b, h, i, j, n


def gathered(x, ids):
    """x ``[B, H, L, N]`` at ids ``[(B,) L, S]``: ``[B, H, L, S]``."""
    y = torch.empty(*x.shape[:-1], ids.shape[-1], dtype=x.dtype).tolist()
    numbers = x.tolist()
    for b, h, i, j, n in _places(ids, *x.shape[:2]):
        y[b][h][i][j] = numbers[b][h][i][n]
    return torch.tensor(y, dtype=x.dtype).view(*x.shape[:-1], ids.shape[-1])


def summed(g, ids, size):
    """g ``[B, H, L, S]`` summed by bucket, in float64: ``[B, H, L, size]``."""
    out = torch.zeros(*g.shape[:-1], size, dtype=torch.float64).tolist()
    numbers = g.double().tolist()
    for b, h, i, j, n in _places(ids, *g.shape[:2]):
        out[b][h][i][n] += numbers[b][h][i][j]
    return torch.tensor(out, dtype=torch.float64).view(*g.shape[:-1], size)
