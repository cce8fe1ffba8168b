"""Write docs/reproduce.md from the headers of the files in configs/.

python docs/make_reproduce.py             # writes the page
python docs/make_reproduce.py --check     # fails where the committed one is another
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reproduce.md"
FIELDS = ("command", "hardware", "time", "expected")
HEAD = """# Reproduce

Written by `python docs/make_reproduce.py` from the headers of the configurations: what each run
is, its command, hardware, time and figure, and who measured it. *Published* figures are their
authors', from their papers; *measured by us* is what the command printed here. What nobody measured
says so. No published ImageNet, COCO, SQuAD or WikiText figure was measured by us.

Beside these, scripts write pages of their own: `python benchmarks/models.py` ([costs](costs.md)),
`python benchmarks/detection.py` ([a small DETR with and without](results/detection.md)),
`python benchmarks/finetune.py` ([fine-tuning](results/finetune.md)), `python benchmarks/text.py`
([encodings of text](results/text.md)), `python benchmarks/ablation.py all` (encodings of images).
What they say, beside the papers: [results](results/README.md).
"""
PARTS = {"cls": "Classification", "det": "Detection", "lm": "Text"}


def header(path):
    """The comment a configuration begins with, without its marks."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].removeprefix(" "))
    return lines


def read(path):
    """Title and fields of a header; a field goes on in lines that stand further in."""
    title, fields, rest, name = [], {}, [], None
    for line in header(path):
        found = re.match(r"  (\w+): +(.*)", line)
        if found and found[1] in FIELDS:
            name = found[1]
            fields[name] = [found[2]]
        elif name and line.startswith("    "):
            fields[name].append(line.strip())
        elif fields:
            name = None
            rest.append(line)
        else:
            title.append(line)
    missing = set(FIELDS) - set(fields)
    if missing:
        raise SystemExit(f"{path}: its header does not say {', '.join(sorted(missing))}")
    return " ".join(title).strip(), fields, " ".join(rest).strip()


def section(path):
    """One configuration's part of the page."""
    title, fields, rest = read(path)
    command = "\n".join(fields.pop("command"))
    text = f"\n### {path.relative_to(ROOT)}\n\n{title}\n\n```text\n{command}\n```\n\n"
    for name, lines in fields.items():
        said = re.sub(r"\bnot measured\b", "**not measured**", " ".join(lines))
        text += f"- {name}: {said}\n"
    return text + (f"\n{rest}\n" if rest else "")


def page():
    """The whole page."""
    text = HEAD
    for folder, name in PARTS.items():
        text += f"\n## {name}\n"
        text += "".join(
            section(path) for path in sorted((ROOT / "configs" / folder).glob("*.yaml"))
        )
    return text


if __name__ == "__main__":
    if "--check" not in sys.argv:
        PAGE.write_text(page())
    elif PAGE.read_text() != page():
        sys.exit("docs/reproduce.md is not what configs say: run python docs/make_reproduce.py")
