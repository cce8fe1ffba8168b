"""docs/extending.md as its reader follows it: files in a folder of one's own."""

import re
import subprocess
import sys

from test_readme import ROOT, blocks

import irpe

PAGE = ROOT / "docs" / "extending.md"
BLOCKS = blocks(PAGE, "python")
# The blocks in order: files by their names, and scripts that use them.
FILES = ("manhattan.py", None, "chunks.py", None, "toyvit.py", "toyvit_irpe.py", None)


def run(folder, *words):
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_runs_outside_of_the_package(tmp_path):
    scripts = []
    for n, (name, code) in enumerate(zip(FILES, BLOCKS, strict=True)):
        name = name or f"script{n}.py"
        (tmp_path / name).write_text(code)
        scripts += [name] if name.startswith("script") else []
    on_timm, explained, on_toy = (run(tmp_path, name) for name in scripts)
    assert on_timm.startswith("manhattan,reach=5 + rope-axial on 2 attention modules")
    assert explained.startswith("backend chunks: ") and "chunks: long inputs" in explained
    assert "rope-axial on 1 attention modules (0)" in on_toy
    assert "rpe-1.9-product-ctx-1-k on 2 attention modules (1 ... 2)" in on_toy
    (command,) = re.findall(r"^irpe (--plugin manhattan .*)$", PAGE.read_text(), re.MULTILINE)
    shown = run(tmp_path, "-m", "irpe", *command.split())
    assert shown.startswith("manhattan,reach=5: buckets of the keys around the query at 7,7\n6 of")


def test_an_encoding_is_one_short_file_of_public_names():
    assert len(BLOCKS[0].splitlines()) <= 60
    text = "".join(BLOCKS)
    assert not re.findall(r"from irpe|import irpe\.", text)
    used = set(re.findall(r"\birpe\.(\w+)", text))
    assert used <= set(irpe.__all__)
    assert {"register", "register_backend", "register_host"} <= used
