"""Write docs/api.md from the docstrings of irpe's public names.

python docs/make_api.py             # writes the page
python docs/make_api.py --check     # fails where the committed one is another
"""

import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import irpe  # noqa: E402
import irpe.zoo  # noqa: E402

PAGE = ROOT / "docs" / "api.md"
HEAD = """# Public names

Written by `python docs/make_api.py` from the docstrings. Shapes: B batch, H heads, L queries,
S keys, D channels of a head, C channels of a token, N buckets, A axes.
"""


def signature(thing):
    """Names and defaults; types and shapes stand in the docstring."""
    try:
        found = inspect.signature(thing)
    except ValueError:
        return ""
    blank = inspect.Parameter.empty
    plain = [p.replace(annotation=blank) for p in found.parameters.values()]
    text = str(found.replace(parameters=plain, return_annotation=blank))
    return re.sub(r"<function (\w+) at 0x\w+>", r"\1", text)


def described(docstring):
    """A docstring in Markdown: its first paragraph as text, the rest as it stands."""
    first, _, rest = inspect.cleandoc(docstring or "").partition("\n\n")
    text = " ".join(first.split()).replace("``", "`")
    return f"{text}\n" + (f"\n```text\n{rest}\n```\n" if rest else "")


def methods(kind):
    """Public methods of a class that have a docstring of their own."""
    for name, member in vars(kind).items():
        call = getattr(member, "__func__", member)
        if not name.startswith("_") and inspect.isfunction(call) and call.__doc__:
            yield name, call


def entry(name, thing):
    """One name's part of the page."""
    text = f"\n## {name}\n\n"
    if not inspect.isclass(thing):
        return f"{text}`irpe.{name}{signature(thing)}`\n\n{described(thing.__doc__)}"
    if issubclass(thing, Exception):
        return text + described(thing.__doc__)
    text += f"`irpe.{name}{signature(thing)}`\n\n{described(thing.__doc__)}"
    for method, call in methods(thing):
        text += f"\n### {name}.{method}\n\n`{method}{signature(call)}`\n\n{described(call.__doc__)}"
    return text


def zoo():
    """The registered models."""
    lines = "".join(f"| `{name}` | `{spec}` |\n" for name, spec in irpe.zoo.SPECS.items())
    text = described(irpe.zoo.__doc__)
    return f"\n## irpe.zoo\n\n{text}\n| name | spec |\n|---|---|\n{lines}"


def page():
    """The whole page."""
    named = ((name, getattr(irpe, name)) for name in sorted(irpe.__all__, key=str.lower))
    return HEAD + "".join(entry(name, thing) for name, thing in named) + zoo()


if __name__ == "__main__":
    if "--check" not in sys.argv:
        PAGE.write_text(page())
    elif PAGE.read_text() != page():
        sys.exit("docs/api.md is not what the docstrings say: run python docs/make_api.py")
