"""What it costs to import irpe, over torch, and to ask the command for help.

    python benchmarks/startup.py                 # prints; --keep writes results/startup_cpu.json

Every result is the wall-clock time of a fresh Python process, from start to end. The processes
take turns, in a new random order in each round, after one that fills the cache of files.
"""

import argparse
import functools
import subprocess
import sys

from measure import CONTROL, interleaved, machine, quiet, ratio, save

# "plain" is what all others are compared with.
CELLS = {
    "plain": ["-c", "import torch"],
    CONTROL: ["-c", "import torch"],
    "import irpe": ["-c", "import irpe"],
    "import torch, irpe": ["-c", "import torch, irpe"],
    # What a program that uses all of it pays.
    "from irpe import *": ["-c", "import torch; from irpe import *"],
    "irpe --help": ["-m", "irpe", "--help"],
}
BARS = {"import torch, irpe": 1.1, "from irpe import *": 1.1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=1, help="rounds that do not count")
    parser.add_argument("--keep", action="store_true", help="write results/startup_cpu.json")
    given = parser.parse_args()
    cells = {
        name: functools.partial(
            subprocess.run, [sys.executable, *words], check=True, stdout=subprocess.DEVNULL
        )
        for name, words in CELLS.items()
    }
    times = interleaved(cells, given.rounds, given.warmup)
    rows = {
        name: {"seconds": sorted(t)[len(t) // 2], "ratio": ratio(t, times["plain"])}
        for name, t in times.items()
    }
    print(f"{'':20}{'s':>7}{'over import torch':>19}{'95 % interval':>17}{'bar':>6}")
    for name, row in rows.items():
        r = row["ratio"]
        bar = BARS.get(name, "")
        spread = f"{r['low']:.3f} - {r['high']:.3f}"
        print(f"{name:20}{row['seconds']:7.3f}{r['median']:19.3f}{spread:>17}{bar:>6}")
    if not quiet(rows):
        print("too noisy: plain against plain does not read 0.98 to 1.02")
    if given.keep:
        command = f"python benchmarks/startup.py --rounds {given.rounds} --keep"
        figures = {"command": command, "machine": machine(), "rounds": given.rounds}
        print(f"wrote {save('startup_cpu', {**figures, 'quiet': quiet(rows), 'rows': rows})}")


if __name__ == "__main__":
    main()
