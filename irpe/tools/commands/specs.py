"""``irpe specs``: every encoding with its string and its formula."""

import argparse
import textwrap

from ...encodings import SPECS, parse
from ...encodings.rpe import OPTIONS


def run(given: argparse.Namespace) -> None:
    """Print a table: string and description on one line, the formula below."""
    print("logit = s q . k, s = scale; d = position of the query - position of the key,")
    print("n(d) its bucket; r a vector, b a number and a a factor for each bucket\n")
    for kind in dict.fromkeys(SPECS.values()):
        # Third-party encodings may have no examples.
        for text, formula, what in kind.examples or ((next(iter(kind.names)), "", ""),):
            print(f"{parse(text)!s:28}{what}\n    {formula}".rstrip())
    print("\nrpe-{ratio}-{method}-{mode}-{shared}-{on}: alpha = ratio, beta = 2 ratio,")
    print("gamma = 8 ratio patches (Wu et al., Eq. 18). Options follow a comma:")
    print(f"{', '.join(f'{option}=' for option in OPTIONS)}. Options of the others:")
    for name, kind in SPECS.items():
        if name != "rpe":
            fields = ", ".join(f"{field.name}=" for field in kind.options(name))
            indent = " " * 14
            line = textwrap.fill(fields, 80, initial_indent=indent, subsequent_indent=indent)
            print(f"  {name:12}{line.lstrip()}".rstrip())
    print("A sum of encodings: rope-axial + rpe-1.9-product-bias-1-k")
