"""What encodings, stages, memories and segments do to small language models: docs/results/text.md.

    python benchmarks/text.py                          # all experiments, seeds 0, 1, 2
    python benchmarks/text.py --only lengths --seeds 0 # one of them
    python benchmarks/text.py --quick --out /tmp/trial # toy sizes: proves the script

Each run is a config of configs/lm and a few options, and leaves a line in a file of JSON lines.
A restarted script resumes, also in the middle of a run. The page is made of the lines in the file.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from measure import machine
from text_report import report
from text_runs import EXPERIMENTS, ROOT, Run, execute, memory, segments, speed

QUICK_NAMES = {"rope", "alibi", "learned"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--quick", action="store_true", help="toy sizes, into --out")
    parser.add_argument("--out", type=Path, help="folder of everything; null: the repository's")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(memory(_named(arguments.memory_of), arguments.quick))
        return
    if arguments.quick and arguments.out is None:
        parser.error("--quick needs --out: its results mean nothing")
    out = arguments.out
    lines_file = (
        ROOT / "benchmarks" / "results" / "text.jsonl" if out is None else out / "text.jsonl"
    )
    pages = ROOT / "docs" / "results" if out is None else out
    runs = (ROOT / "runs" if out is None else out) / "text"
    lines_file.parent.mkdir(parents=True, exist_ok=True)
    for line in work(arguments, lines_file, runs):
        with lines_file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"done: {line['key']}", flush=True)
    if not lines_file.exists():
        sys.exit("error: nothing was run")
    command = "python benchmarks/text.py " + " ".join(sys.argv[1:])
    print("written to", report(read(lines_file), pages, command.strip()))


def work(arguments: argparse.Namespace, lines_file: Path, runs: Path):
    """Yield the lines of all that is left to do."""
    done = {line["key"] for line in read(lines_file)}
    given = (runs, arguments.quick, arguments.threads)
    for seed in arguments.seeds:
        for experiment in arguments.only:
            for run in EXPERIMENTS[experiment](seed):
                short = arguments.quick and experiment in ("lengths", "segments")
                if run.key in done or (short and run.name.split()[0] not in QUICK_NAMES):
                    continue
                yield execute(run, *given)
            # The time of a token does not depend on the seed.
            if experiment == "shortformer" and not any("speed seed" in key for key in done):
                yield speed(runs, seed, arguments.quick, arguments.threads)
    if "segments" in arguments.only:
        for name in ("rope plain", "rope chunk", "rope twice", "learned plain", "learned chunk"):
            if f"memory {name}" not in done:
                yield measured(name, arguments.quick)


def measured(name: str, quick: bool) -> dict:
    """Memory of a step, in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", name, *(["--quick"] if quick else [])]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {
        "key": f"memory {name}", "experiment": "memory", "name": name, "quick": quick,
        "mib": float(found.split()[-1]), "machine": machine(),
    }  # fmt: skip


def _named(name: str) -> Run:
    return next(run for run in segments(0) if run.name == name)


def read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(text) for text in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
