"""Bucket functions as plain Python, one offset at a time (Wu et al., Eq. 18 and section 3.3)."""

import math


def coefficients(spec):
    """alpha, beta, gamma of anything that has a spec's fields."""
    given = (spec.alpha, spec.beta, spec.gamma)
    return tuple(
        g if g is not None else factor * spec.ratio
        for g, factor in zip(given, (1, 2, 8), strict=True)
    )


def piecewise(x, alpha, beta, gamma):
    """Eq. 18 of an integer offset, truncated to an integer."""
    if abs(x) <= alpha:
        return x
    far = round(alpha + math.log(abs(x) / alpha) / math.log(gamma / alpha) * (beta - alpha))
    return int(math.copysign(min(beta, far), x))


def clip(x, beta):
    """The alternative that the paper compares with."""
    return int(max(-beta, min(beta, x)))


def rank(squared):
    """How many squared lengths of integer vectors are below this one."""
    lengths = {0}
    for _ in range(2):
        lengths = {n + x * x for n in lengths for x in range(math.isqrt(squared) + 1)}
    return sum(length < squared for length in lengths)


def step(spec, x):
    """The one-dimensional index of a spec."""
    alpha, beta, gamma = coefficients(spec)
    return clip(x, beta) if spec.index == "clip" else piecewise(x, alpha, beta, gamma)


def buckets(spec, axes=2):
    """The bucket functions of a spec, one an axis for cross; each takes an offset on each axis."""
    bound = int(coefficients(spec)[1])
    side = 2 * bound + 1

    def single(*offsets):
        squared = sum(x * x for x in offsets)
        if spec.method == "euc":
            return step(spec, round(math.sqrt(squared))) + bound
        if spec.method == "quant":
            return step(spec, squared) + bound
        if spec.method == "rank":
            return step(spec, rank(squared)) + bound
        found = 0
        for x in offsets:
            found = found * side + step(spec, x) + bound
        return found

    if spec.method == "cross":
        return tuple(lambda *x, n=n: step(spec, x[n]) + bound for n in range(axes))
    return (single,)


def num_buckets(spec, prefix, axes=2):
    """N of one table; ``prefix``: whether prefix tokens have a bucket."""
    side = 2 * int(coefficients(spec)[1]) + 1
    return (side**axes if spec.method == "product" else side) + bool(prefix)


def grid(height, width, prefix=0):
    """Positions of all tokens, row by row; None for a prefix token."""
    return [None] * prefix + [(r, c) for r in range(height) for c in range(width)]


def volume(frames, height, width, prefix=0):
    """Positions of all tokens, frame by frame and row by row; None for a prefix token."""
    places = [(t, r, c) for t in range(frames) for r in range(height) for c in range(width)]
    return [None] * prefix + places


def ids(function, queries, keys, last):
    """``[L][S]`` ids of offsets query - key; pairs with a prefix token are in bucket ``last``."""
    return [
        [
            last
            if q is None or k is None
            else function(*(a - b for a, b in zip(q, k, strict=True)))
            for k in keys
        ]
        for q in queries
    ]
