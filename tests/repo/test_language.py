"""Words that the project no longer uses in its text: CONTRIBUTING.md, principle 6.

Pages and configurations are searched whole, Python files in their comments and docstrings.
"""

import ast
import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What is searched for -> what to write instead.
WORDS = {
    r"equip(s|ped|ping)?": "attach; with an encoding attached",
    r"obstacles?": "the reason why it is unsupported",
    r"stretch(es|ed|ing)?": "interpolate",
    r"anew": "again; recomputed",
    r"laid out|lays? out": "materialise",
    r"put_on|take_off": "add_encodings, remove_encodings",
    r"go(es|ing)? on": "resume, continue, run",
    r"in vain": "wasted work",
    r"by whom": "source",
    r"the host'?s?": "the library, the model",
    r"as they come": "unmodified",
    r"as it comes": "unmodified",
    r"figures? (of|is|are|that|stands?)": "number, result",
    r"(module|layer|model|backend|kernel|encoding)s? (knows?|tells?|wants?|answers?)": "a verb of "
    "what it does: stores, returns, passes, reads",
    r"wants? a gradient": "requires a gradient",
}
# Files that say such a word rightly: the pattern, and its lines.
ALLOWED = {
    "CHANGELOG.md": "stretch",  # names of 0.1
    "benchmarks/fashion.py": "stretch",  # images, to another shape
    "docs/results/fashion.md": "stretch",
    "training/run_directory.py": "host",  # a machine
    "training/distributed.py": "host",
    "training/cls/model.py": "host",
    "tests/repo/test_language.py": "",
}
FOUND = re.compile(rf"\b({'|'.join(WORDS)})\b", flags=re.IGNORECASE)


def files():
    """The text files that git tracks."""
    listed = ["git", "ls-files", "-z", "--", "*.py", "*.md", "*.yaml", "*.yml"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.split("\0") if (ROOT / name).is_file()]


def prose(name, text):
    """(line, text) of what people read in a file."""
    if not name.endswith(".py"):
        yield 1, text
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node):
            yield node.body[0].lineno, node.body[0].value.value


def findings(name, text):
    allowed = ALLOWED.get(name)
    for first, part in prose(name, text):
        for match in FOUND.finditer(part):
            if allowed is None or allowed not in match[0].lower():
                line = first + part.count("\n", 0, match.start())
                yield f"{name}:{line}: {match[0]!r}"


def test_words():
    found = [hit for name in files() for hit in findings(name, (ROOT / name).read_text("utf-8"))]
    assert not found, "\n".join(found)


def test_a_word_is_found():
    code = '"""First.\n\nIt knows: the module knows."""\nequipped = 1  # as they come\n'
    assert list(findings("a.py", code)) == ["a.py:4: 'as they come'", "a.py:3: 'module knows'"]
    assert list(findings("a.md", "one\nis equipped")) == ["a.md:2: 'equipped'"]
    assert not list(findings("CHANGELOG.md", "`irpe.stretch`"))
