"""Comparisons of image encodings in small: docs/results/image.md and docs/results/fashion.md.

    python benchmarks/ablation.py modes                 # one table, seeds 0 to 4
    python benchmarks/ablation.py digits --jobs 2       # all on digits, two runs at a time
    python benchmarks/ablation.py decide scale          # four questions, 20 seeds
    python benchmarks/ablation.py fashion --jobs 2      # Fashion-MNIST
    python benchmarks/ablation.py modes --quick --out /tmp/trial   # toy sizes: proves the script

Each run leaves a line in a file of JSON lines; started again, the script does what is missing. A
model that stands in several tables is trained once. A run has one thread whatever --jobs says, so
that numbers do not depend on it. The page is made of the lines in the file.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ablation_report import report
from ablation_runs import IMAGE
from ablation_tables import Cell, Study
from fashion import FASHION
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
LINES = ROOT / "benchmarks" / "results"
STUDIES = (IMAGE, FASHION)
PAGES = ROOT / "docs" / "results"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = [name for study in STUDIES for name in study.tables]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(every)}, or digits")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="default: 0 to 4; decide, scale: 0 to 19"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--quick", action="store_true", help="toy sizes, seeds 0 and 1, into --out")
    parser.add_argument("--out", type=Path, help="folder of everything; default: the repository's")
    given = parser.parse_args(argv)
    names = list(IMAGE.tables) if given.names == ["digits"] else given.names
    if unknown := [name for name in names if name not in every]:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(every)}, digits")
    if given.quick and given.out is None:
        parser.error("--quick needs --out: its numbers mean nothing")
    studies = [study for study in STUDIES if set(names) & set(study.tables)]
    for study in studies or [IMAGE]:
        own = [name for name in names if name in study.tables]
        measure(study, own, given.seeds, given.jobs, quick=given.quick, out=given.out)


def measure(
    study: Study, names: list[str], seeds: list[int] | None, jobs: int, *, quick: bool,
    out: Path | None,
) -> None:  # fmt: skip
    """Do the runs of a study's tables that are missing, and write its page."""
    lines_file = (out or LINES) / f"{study.name}.jsonl"
    recipe = study.quick if quick else study.recipe
    lines_file.parent.mkdir(parents=True, exist_ok=True)
    done = {line["key"] for line in read(lines_file, recipe)}
    seeds = seeds or ([0, 1] if quick else None)
    wanted = {
        f"{cell.key} | seed {seed}": (cell, seed)
        for name in names
        for seed in seeds or range(study.tables[name].seeds)
        for cell in study.tables[name].rows.values()
    }
    left = [run for key, run in wanted.items() if key not in done]
    # Where a bar would only fill a log, it is not drawn.
    with tqdm(total=len(left), unit="run", disable=None) as bar, lines_file.open("a") as file:
        for line in work(study, left, recipe, jobs):
            file.write(json.dumps(line) + "\n")
            file.flush()
            bar.set_postfix_str(f"{line['key']}: {line['accuracy']:.1f} %")
            bar.update()
    lines = read(lines_file, recipe)
    if not lines:
        sys.exit("error: nothing was run: name a table, or digits")
    print("written to", report(lines, PAGES if out is None else out, study))


def work(
    study: Study, runs: list[tuple[Cell, int]], recipe: dict[str, Any], jobs: int
) -> Iterator[dict[str, Any]]:
    """Yield the lines of runs, as they end."""
    if jobs == 1:
        yield from (study.execute(cell, seed, recipe) for cell, seed in runs)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        made = [pool.submit(study.execute, cell, seed, recipe) for cell, seed in runs]
        yield from (future.result() for future in as_completed(made))


def read(path: Path, recipe: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """The lines of a file, all of one recipe."""
    lines = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    if recipe is not None and any(line["recipe"] != recipe for line in lines):
        sys.exit(f"error: {path} holds runs of another recipe: move it away, or name another --out")
    return lines


if __name__ == "__main__":
    main()
