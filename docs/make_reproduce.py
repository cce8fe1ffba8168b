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

```
python train_cls.py --config configs/cls/digits.yaml
```

Each run below has its command, hardware, time and expected result. `python docs/make_reproduce.py`
writes this page from the headers of the configurations. *Published* results are from the authors'
papers; *measured by us* is what the command printed here. We measured no published ImageNet, COCO,
SQuAD or WikiText result.

More scripts write pages of their own: `python benchmarks/models.py` ([costs](costs.md)),
`python benchmarks/detection.py` ([a small DETR with and without](results/detection.md)),
`python benchmarks/finetune.py` ([fine-tuning](results/finetune.md)), `python benchmarks/text.py`
([encodings of text](results/text.md)), `python benchmarks/ablation.py digits` ([encodings of
images](results/image.md)). [Results](results/README.md) compares them with the papers.
"""
PARTS = {"cls": "Classification", "det": "Detection", "lm": "Text"}


def header(path):
    """Return the comment at the start of a configuration, without its marks."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].removeprefix(" "))
    return lines


def read(path):
    """Return title and fields of a header; indented lines continue a field."""
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
        raise SystemExit(f"{path}: its header lacks {', '.join(sorted(missing))}")
    return " ".join(title).strip(), fields, " ".join(rest).strip()


def section(path):
    """Return the part of the page about one configuration."""
    title, fields, rest = read(path)
    command = "\n".join(fields.pop("command"))
    text = f"\n### {path.relative_to(ROOT)}\n\n{title}\n\n```text\n{command}\n```\n\n"
    for name, lines in fields.items():
        said = re.sub(r"\bnot measured\b", "**not measured**", " ".join(lines))
        text += f"- {name}: {said}\n"
    return text + (f"\n{rest}\n" if rest else "")


def page():
    """Return the whole page."""
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
