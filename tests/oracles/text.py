"""One-dimensional encodings and rotary ones as loops over samples, heads, queries and keys."""

import math

import torch


def frequencies(width, base):
    """Radians per position of each pair of channels (Su et al., Eq. 15)."""
    return [base ** (-2 * t / width) for t in range(width // 2)]


def yarn(width, base, factor, original, fast=32.0, slow=1.0):
    """Frequencies and the factor of cosines and sines, plane by plane (Peng et al., 2023)."""

    def plane(turns):
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(0, math.floor(plane(fast))), min(width - 1, math.ceil(plane(slow)))
    made = []
    for t, theta in enumerate(frequencies(width, base)):
        ramp = min(1, max(0, (t - low) / (high - low)))
        made.append((1 - ramp) * theta + ramp * theta / factor)
    return made, 0.1 * math.log(factor) + 1


def llama3(width, base, factor, original, low=1.0, high=4.0):
    """Frequencies, by wavelengths: kept, divided, or between (Grattafiori et al., 2024)."""
    made = []
    for theta in frequencies(width, base):
        wave = 2 * math.pi / theta
        if wave < original / high:
            made.append(theta)
        elif wave > original / low:
            made.append(theta / factor)
        else:
            smooth = (original / wave - low) / (high - low)
            made.append((1 - smooth) * theta / factor + smooth * theta)
    return made


def dynamic(width, base, factor, original, length):
    """Frequencies of a base that grows once the text is longer than the original."""
    grown = factor * max(length, original) / original - (factor - 1)
    return frequencies(width, base * grown ** (width / (width - 2)))


def longrope(width, base, original, short, long, length):
    """Frequencies divided by factors of their own (Ding et al., 2024)."""
    factors = long if length > original else short
    return [theta / f for theta, f in zip(frequencies(width, base), factors, strict=True)]


def axial(width, base, order):
    """For each pair of channels (radians per row, radians per column) (Heo et al., 2024)."""
    powers = [base ** (-4 * t / width) for t in range(width // 4)]
    rows, columns = [(p, 0.0) for p in powers], [(0.0, p) for p in powers]
    return rows + columns if order == "yx" else columns + rows


def rotated(x, angles, layout, factor=1.0):
    """A vector ``[D]`` with its first 2 len(angles) channels turned pair by pair."""
    y, pairs = list(x.unbind()), len(angles)
    for t, angle in enumerate(angles):
        a, b = (2 * t, 2 * t + 1) if layout == "interleaved" else (t, t + pairs)
        angle = torch.as_tensor(angle, dtype=torch.float64)
        cos, sin = angle.cos() * factor, angle.sin() * factor
        y[a], y[b] = x[a] * cos - x[b] * sin, x[b] * cos + x[a] * sin
    return torch.stack(y)


def sinusoid(position, dim, form, base=10000.0):
    """A row of sinusoids, a list of numbers."""
    row = [0.0] * dim
    if form == "paper":
        for c in range(dim):
            angle = position * base ** (-(c // 2 * 2) / dim)
            row[c] = math.sin(angle) if c % 2 == 0 else math.cos(angle)
        return row
    half = dim // 2
    for t in range(half):
        angle = position * math.exp(-t * math.log(base) / (half - 1))
        row[t], row[half + t] = math.sin(angle), math.cos(angle)
    return row


def clip(offset, bound):
    return max(-bound, min(bound, offset))


def t5_bucket(offset, buckets, most, bidirectional):
    """Bucket of query - key (Raffel et al.; their relative position is key - query)."""
    relative, bucket = -offset, 0
    if bidirectional:
        buckets //= 2
        if relative > 0:
            bucket += buckets
        relative = abs(relative)
    else:
        relative = max(0, -relative)
    exact = buckets // 2
    if relative < exact:
        return bucket + relative
    far = exact + int(math.log(relative / exact) / math.log(most / exact) * (buckets - exact))
    return bucket + min(far, buckets - 1)


def slopes(heads):
    """ALiBi's, as its authors' code says them."""

    def powers(n):
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start ** (h + 1) for h in range(n)]

    if math.log2(heads).is_integer():
        return powers(heads)
    closest = 2 ** math.floor(math.log2(heads))
    return powers(closest) + slopes(2 * closest)[0::2][: heads - closest]


def interpolated(rows, length, anchor):
    """A table, as a list of lists of numbers, interpolated to more rows."""
    n, made = len(rows), []
    for p in range(length):
        place = {
            "left": p * n / length,
            "corners": p * (n - 1) / (length - 1),
            "half_pixel": max((p + 0.5) * n / length - 0.5, 0.0),
        }[anchor]
        first = min(int(place + 1e-9), n - 1)
        part, second = place - first, min(first + 1, n - 1)
        made.append(
            [(1 - part) * a + part * b for a, b in zip(rows[first], rows[second], strict=True)]
        )
    return made


def attention(q, k, v, logit, value=None, mask=None, is_causal=False):
    """Softmax attention with any logit and any addition to values.

    Args:
        q: ``[B, H, L, D]``.
        k, v: ``[B, H, S, D]``.
        logit: ``logit(b, h, i, j)``, whatever an encoding makes of query i and key j.
        value: ``value(b, h, i, j)``, what joins v_j for query i; None: nothing.
        mask: bool or additive, of the full shape ``[B, H, L, S]``.
    """
    B, H, L, _ = q.shape
    S = k.shape[2]
    rows = []
    for b in range(B):
        for h in range(H):
            for i in range(L):
                logits, seen = [], []
                for j in range(S):
                    if is_causal and j > i + S - L:
                        continue
                    added = 0.0
                    if mask is not None and mask.dtype == torch.bool:
                        if not bool(mask[b, h, i, j]):
                            continue
                    elif mask is not None:
                        if float(mask[b, h, i, j]) == float("-inf"):
                            continue
                        added = mask[b, h, i, j]
                    logits.append(logit(b, h, i, j) + added)
                    seen.append(j)
                row = q.new_zeros(v.shape[-1])
                if seen:
                    weights = torch.stack(logits).exp() / torch.stack(logits).exp().sum()
                    for p, j in zip(weights, seen, strict=True):
                        extra = 0.0 if value is None else value(b, h, i, j)
                        row = row + p * (v[b, h, j] + extra)
                rows.append(row)
    return torch.stack(rows).view(B, H, L, -1)


def linear_attention(q, k, v, turn_q, turn_k, is_causal=False, seen=None):
    """Eq. 19 of Su et al. with elu(x) + 1: only the numerator is rotated.

    Args:
        turn_q, turn_k: ``turn(b, h, i, x)`` rotates a vector ``[D]``.
        seen: bool ``[B, S]``, False for keys that are padding.
    """
    B, H, L, _ = q.shape
    S = k.shape[2]
    rows = []
    for b in range(B):
        for h in range(H):
            for i in range(L):
                phi = torch.nn.functional.elu(q[b, h, i]) + 1
                top, bottom = q.new_zeros(v.shape[-1]), q.new_zeros(())
                for j in range(S):
                    hidden = is_causal and j > i + S - L
                    if hidden or (seen is not None and not bool(seen[b, j])):
                        continue
                    psi = torch.nn.functional.elu(k[b, h, j]) + 1
                    weight = (turn_q(b, h, i, phi) * turn_k(b, h, j, psi)).sum()
                    top = top + weight * v[b, h, j]
                    bottom = bottom + (phi * psi).sum()
                rows.append(top / bottom if float(bottom.detach()) else top)
    return torch.stack(rows).view(B, H, L, -1)
