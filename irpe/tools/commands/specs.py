"""``irpe specs``: every encoding, its string, its formula. Does without torch."""

import argparse

from ...spec import NAMES, parse
from ...spec.grammar import options
from ...spec.image import OPTIONS

# An example for each name that a string can start with, and what the encoding does there.
# q, k, v: a query, a key, a value; s = scale; d = query's position - key's; n(d): its bucket.
SPECS: list[tuple[str, str, str]] = [
    ("rpe-1.9-product-ctx-1-k", "logit + s q . r[n(d)]", "image; a pair of a row and a column"),
    ("rpe-1.9-product-ctx-1-qkv", "also s k . r'[n(-d)]; v + r''[n(d)]", "on q, k and v"),
    ("rpe-20.0-cross-ctx-1-k", "logit + s q . (r[n(dy)] + c[n(dx)])", "rows, columns apart"),
    ("rpe-20.0-euc-ctx-1-k", "logit + s q . r[n(|d|)]", "Euclidean distance, rounded"),
    ("rpe-33.0-quant-ctx-1-k", "logit + s q . r[n(|d|^2)]", "its square, as released"),
    ("rpe-33.0-rank-ctx-1-k", "logit + s q . r[n(rank |d|)]", "its rank, as in the paper"),
    ("rpe-2.0-product-bias-0-k", "logit + b[n(d)]", "a number for each bucket"),
    ("rope", "q R(i) . R(j) k", "rotations by position"),
    ("rope-axial", "q R(y, x) . R(y', x') k", "image; half by rows, half by columns"),
    ("rope-mixed", "q R(y, x) . R(y', x') k", "image; learned frequencies"),
    ("alibi", "logit - m[h] |d|", "text or image; m[h] = 2^(-8h/H)"),
    ("t5,buckets=32,max=128", "logit + b[h, n(d)]", "buckets grow with log |d|"),
    ("shaw,clip=64", "logit + s q . r[clip(d)]", "with ,on=kv also v + r'[clip(d)]"),
    ("huang1,clip=64", "logit * a[clip(|d|)]", "a number for each distance"),
    ("huang2,clip=64", "logit * a[clip(d)]", "for each signed distance"),
    ("huang3,clip=64", "s sum_c q_c k_c a_c[clip(d)]", "a factor for each channel"),
    ("huang4,clip=64", "logit + s q . r[clip(d)] + s k . r[clip(d)]", "relative_key_query"),
    ("sinusoidal", "x + sin, cos(i / base^(2t/C))", "at the model's input"),
    ("learned,length=512", "x + p[i]", "at the model's input"),
    ("pia", "Wq (x + p[i]), Wk (x + p[j])", "never in values"),
]


def run(given: argparse.Namespace) -> None:
    """Print the table; a string and what it is on one line, its formula below."""
    print("logit = s q . k, s = scale; d = place of the query - place of the key,")
    print("n(d) its bucket; r a vector, b a number and a a factor for each bucket\n")
    for text, formula, what in SPECS:
        print(f"{parse(text)!s:28}{what}\n    {formula}")
    print("\nrpe-{ratio}-{method}-{mode}-{shared}-{on}: alpha = ratio, beta = 2 ratio,")
    print("gamma = 8 ratio patches (Wu et al., Eq. 18), or as said behind a comma:")
    print(f"{', '.join(f'{option}=' for option in OPTIONS)}. Options of the others:")
    for name, kind in NAMES.items():
        fields = ", ".join(f"{field.name}=" for field in options(kind, name))
        print(f"  {name:12}{fields}")
