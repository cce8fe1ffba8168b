"""README and docs: their Python runs as printed, commands, links and tests name what exists."""

import re
import shlex
from pathlib import Path

import pytest

from irpe.tools.arguments import parser

ROOT = Path(__file__).parents[2]
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")]
PAGES = [*TOP, *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(path, language):
    """Fenced blocks of one language; "" for those without a name."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [code for name, code in fenced if name == language]


PYTHON = [
    (page.name, n, b)
    for page in PAGES
    if page.name != "extending.md"  # files that import one another: test_extending.py
    for n, b in enumerate(blocks(page, "python"))
]
SHELL = [line for page in PAGES for b in blocks(page, "") for line in b.strip().splitlines()]


@pytest.mark.parametrize(("page", "number", "code"), PYTHON, ids=lambda x: str(x)[:12])
def test_python_blocks_run(page, number, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    exec(compile(code, f"{page}#{number}", "exec"), {})


def test_first_screen():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines.index("```python") < 20
    assert any("![" in line for line in lines[:30])


def test_commands_name_files_and_extras_that_exist():
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    commands = [part for line in SHELL for part in line.split("&&")]
    assert any("train_cls.py" in c for c in commands)
    for command in commands:
        words = shlex.split(command)
        if not words or words[0] not in ("python", "pip"):
            continue
        for extra in re.findall(r"\.\[(\w+)\]", command):
            assert extra in extras, command
        for word in words:
            if word.endswith((".py", ".yaml")):
                assert (ROOT / word).is_file(), f"{command}: there is no {word}"


def test_examples_of_the_irpe_command_can_be_parsed():
    found = [shlex.split(line) for line in SHELL if line.startswith("irpe ")]
    assert found
    for words in found:
        assert parser().parse_args(words[1:]).command == words[1]


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            file, _, place = target.partition("#")
            if "://" in target:
                continue
            found = page.parent / file if file else page
            assert found.exists(), f"{page.name}: {target}"
            if place and found.suffix == ".md":
                assert place in anchors(found), f"{page.name}: {target}"


def anchors(page):
    """What a link can name behind its #: headings, as GitHub and MkDocs spell them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    heads = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads]


def test_tests_that_pages_name_exist():
    named = [
        (page.name, *found)
        for page in PAGES
        for found in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text())
    ]
    assert len(named) > 20
    for page, file, test in named:
        text = (ROOT / file).read_text()
        assert not test or f"\ndef {test}(" in text, f"{page}: {file}::{test}"


def test_every_line_of_production_names_its_test():
    text = (ROOT / "docs/production.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(lines) > 20
    for line in lines:
        assert re.search(r"`tests/\w+\.py::test_\w+`", line.split(" | ")[-1]), line
