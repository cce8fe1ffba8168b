"""Numbers in docs/results, docs/costs.md and the README are in the files of benchmarks/results.

Pages that scripts write are written again from the measured lines, and compared. On pages that
people write, each number is looked up in the files that its section names.
"""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS, PAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "results"
# Page, heading -> the result files, or pages written by scripts, that its numbers come from.
WRITTEN_BY_PEOPLE = {
    ("README.md", "What you gain, what it costs"): ["models_cpu.json", "image.md"],
    ("docs/costs.md", "Time and memory"): [
        "models_cpu.json", "models_encoder_cpu.json", "text_attention_cpu.json",
        "attention_cpu.json",
    ],
    ("docs/costs.md", "Startup"): ["startup_cpu.json"],
    ("docs/scale.md", "What two processes show"): ["scaling_cpu.json"],
    ("docs/long_runs.md", "Measured"): ["soak_cpu.json"],
}  # fmt: skip
# Counted and not measured, or a setting: tests/test_complexity.py holds the first.
NOT_MEASURED = r"Multiply-adds:[^.]*\.|\d+ % interval|[A-Z] = \d+|torch \S+|\d{4}-\d\d-\d\d|`[^`]*`"


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def read(name):
    if name.endswith(".md"):
        return shown((PAGES / name).read_text())
    return json.loads((RESULTS / name).read_text())


def shown(page):
    """The numbers with a point on a page that a script wrote."""
    return [float(number) for number in re.findall(r"\d+\.\d+", page)]


def lines(name):
    return [json.loads(text) for text in (RESULTS / name).read_text().splitlines()]


def image(folder):
    from ablation_report import report

    return report(lines("image.jsonl"), folder).read_text()


def text(folder):
    from text_report import report

    command = re.search(r"`(python .*?)` writes", (PAGES / "text.md").read_text())[1]
    return report(lines("text.jsonl"), folder, command).read_text()


def detection(folder):
    from detection import page

    found = read("detection_digits.json")
    seeds = len({row["seed"] for row in found["rows"]})
    return page(found["rows"], found["machine"], seeds, "digits")


def finetune(folder):
    from finetune import page

    found = read("finetune_digits.json")
    return page(found["runs"], found["given"], found["machine"])


def finetune_commands(folder):
    from finetune_commands import page

    return page(read("finetune_commands.json"))


def faults(folder):
    from faults import page

    found = read("faults.json")
    return page(found["faults"], found["command"], found["machine"])


def video(folder):
    from video import page

    return page(lines("video.jsonl"))


def native(folder):
    import native as script

    return script.page(script.read(RESULTS / "native.jsonl"))


WRITTEN = {
    f.__name__: f
    for f in (image, text, detection, finetune, finetune_commands, faults, video, native)
}


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", WRITTEN)
def test_pages_are_what_was_measured(name, tmp_path):
    assert WRITTEN[name](tmp_path) == (PAGES / f"{name}.md").read_text()


def test_every_page_of_results_is_looked_after():
    pages = {path.stem for path in PAGES.glob("*.md")}
    assert pages == {*WRITTEN, "README"}


def test_every_page_names_command_hardware_and_date():
    for name in (path.stem for path in PAGES.glob("*.md") if path.stem in WRITTEN):
        found = (PAGES / f"{name}.md").read_text()
        assert re.search(r"`python benchmarks/\w+\.py", found), name
        assert re.search(r"torch \d+\.\d+", found) and re.search(r"20\d\d-\d\d-\d\d", found), name
        assert re.search(r"EPYC|Xeon|Ryzen|Core", found), name


def values(found):
    """All numbers in a result, and of rows how much more memory they take than the plain one."""
    if isinstance(found, dict):
        plain = found.get("plain", {}).get("peak_mib") if "plain" in found else None
        for row in found.values():
            if plain and row.get("peak_mib"):
                yield row["peak_mib"] / plain
            yield from values(row)
    elif isinstance(found, list):
        for row in found:
            yield from values(row)
    elif isinstance(found, int | float):
        yield found


def section(page, heading):
    found = re.split(r"^## (.*)$", (ROOT / page).read_text(), flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))[heading]


def unknown(told, known):
    """Return numbers with a point, or in a column of whole MiB, that no known number rounds to."""
    told = re.sub(NOT_MEASURED, "", told)
    numbers = re.findall(
        r"(?<![\w.])\d+\.\d+(?![\w.]*\d)|(?<=\| )\d{2,}(?= [|(])|(?<=\()\d{2,}(?=\))", told
    )
    places = {number: len(number.partition(".")[2]) for number in numbers}
    return [f for f, n in places.items() if not any(f"{value:.{n}f}" == f for value in known)]


@pytest.mark.parametrize(("page", "heading"), WRITTEN_BY_PEOPLE)
def test_numbers_are_in_result_files(page, heading):
    known = list(values([read(name) for name in WRITTEN_BY_PEOPLE[page, heading]]))
    assert len(known) > 10
    assert not unknown(section(page, heading), known)


def test_the_page_about_results_repeats_what_the_others_say():
    own = PAGES / "README.md"
    others = " ".join(page.read_text() for page in PAGES.glob("*.md") if page != own)
    assert not unknown(own.read_text(), shown(others))


def test_a_wrong_number_is_found():
    known = list(values({"plain": {"peak_mib": 100.0}, "k": {"peak_mib": 116.4, "ratio": 1.0718}}))
    told = "| `k` | 1.072 | 116 (100) |, 1.16 times plain; 95 % interval, L = 1024, torch 2.14.1"
    assert unknown(told, known) == []
    assert unknown("1.073, 1.17 | 117 |", known) == ["1.073", "1.17", "117"]
    assert unknown(told + " 1.1", known) == [] != unknown(told + " 1.3", known)
