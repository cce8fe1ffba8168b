"""The site: it builds strictly, its generated pages are up to date, and it fetches nothing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason='pip install -e ".[docs]" brings mkdocs')
    folder = tmp_path_factory.mktemp("site")
    run = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_built(site):
    pages = {p.relative_to(ROOT / "docs") for p in (ROOT / "docs").rglob("*.md")}
    for page in pages:
        folder = page.parent if page.name in ("index.md", "README.md") else page.with_suffix("")
        assert (site / folder / "index.html").is_file(), page
    assert (site / "interactive" / "buckets.html").is_file()
    assert not list(site.rglob("*.py"))


def test_nothing_is_fetched_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        fetched = re.findall(r'<(?:script|img|iframe)[^>]+src="?(\w+:)?//', text)
        fetched += re.findall(
            r'<link[^>]+rel="?(?:stylesheet|preconnect)"?[^>]+href="?(?:\w+:)?//', text
        )
        assert not fetched, page


@pytest.mark.cases(1)
@pytest.mark.parametrize("script", ["make_api.py", "make_reproduce.py"])
def test_generated_pages_are_up_to_date(script):
    run = [sys.executable, str(ROOT / "docs" / script), "--check"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
