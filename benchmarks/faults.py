"""Kill training runs at random times, resume them, and compare with an undisturbed run.

    python benchmarks/faults.py                        # 20 kills of each script, then the disks
    python benchmarks/faults.py --scripts lm --kills 3 --no-page

Each fault is a run of its own, on a tiny model: SIGKILL after a random time, at a random operation
on a file of the run, or in the midst of writing a state; then the same command with `--resume
auto`. Weights, averaged weights and metrics must be those of the undisturbed run, bit for bit, and
no more steps repeated than lie between two checkpoints. Writes benchmarks/results/faults.json and
docs/results/faults.md. Exit status 1 if a run did not survive.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from fault_runs import (  # noqa: E402
    SAVE_STEPS,
    Run,
    at_operation,
    count_operations,
    read_only,
    results,
    same,
    within_state,
)  # fmt: skip
from measure import machine, save  # noqa: E402

from training.data.scenes import Scenes, make_scenes, scene_paths  # noqa: E402


def kill_one(run: Run, kind: str, draw: random.Random, counts: tuple[int, int, int, float]) -> int:
    """Kill the run once; return the steps that it had done."""
    operations, states, steps, seconds = counts
    if kind == "time":
        process, step = run.start(), draw.randint(0, steps - 1)
        while process.steps.value < step:
            time.sleep(0.001)
        time.sleep(draw.uniform(0.0, 2 * seconds / steps))
        process.kill()
    elif kind == "file operation":
        process = run.start(fault=at_operation(draw.randint(1, operations)))
    else:
        process = run.start(fault=within_state(draw.randint(1, states), draw.random()))
    process.join()
    return process.steps.value


KINDS = ("time", "file operation", "within a state")


def kills(script: str, folder: Path, data: list[str], number: int, seed: int) -> list[dict]:
    """Kill ``number`` runs of a script, resume each, and compare."""
    whole = Run(script, folder / "whole", data)
    counts = count_operations(whole)
    expected, rows, draw = results(whole.folder()), [], random.Random(f"{script}{seed}")
    steps = expected["records"][-1]["step"]
    for at in range(number):
        run, kind = Run(script, folder / f"kill{at}", data), KINDS[at % len(KINDS)]
        before = kill_one(run, kind, draw, counts)
        # Some are killed when all is done, as they leave.
        status, after = (0, 0) if run.finished else run.whole("--resume=auto")
        lost = max(0, before + after - steps)
        fine = not status and run.finished and same(results(run.folder()), expected)
        rows.append(
            {"script": script, "fault": f"SIGKILL: {kind}", "at_step": before, "lost": lost}
            | {"survived": fine and lost <= SAVE_STEPS, "said": run.said() if not fine else ""}
        )
        print(f"{script}: killed ({kind}) after step {before}: {verdict(rows[-1])}", flush=True)
        shutil.rmtree(run.output)
    return rows


def verdict(row: dict[str, Any]) -> str:
    fine = "survived" if row["survived"] else f"NOT SURVIVED ({row['said']})"
    return f"{fine}, {row['lost']} steps repeated"


def disks(script: str, folder: Path, data: list[str]) -> list[dict]:
    """A file system that is full at a checkpoint, and one that turns read-only; needs root."""
    whole = Run(script, folder / "whole", data)
    expected = results(whole.folder())
    steps, rows = expected["records"][-1]["step"], []
    state = max(path.stat().st_size for path in whole.folder().rglob("state-*"))
    for fault in ("full disk", "read-only folder"):
        mounted = folder / "disk"
        mounted.mkdir(exist_ok=True)
        run = Run(script, mounted, data)
        # Two states and the one that is being written, but not the weights of the first epoch.
        size = "1g" if fault != "full disk" else str(int(2.5 * state))
        options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mounted)]
        if subprocess.run(options, check=False, capture_output=True).returncode:
            print(f"{fault}: left out, as nothing can be mounted here")
            return rows
        try:
            fault_of = read_only if fault == "read-only folder" else lambda output: None
            status, before = run.whole(fault=fault_of)
            said = run.said()
            clear = status == 2 and said.startswith("error: cannot write")
            subprocess.run(["mount", "-o", "remount,rw,size=1g", str(mounted)], check=True)
            status, after = run.whole("--resume=auto")
            fine = clear and not status and same(results(run.folder()), expected)
            lost = max(0, before + after - steps)
            rows.append(
                {"script": script, "fault": fault, "at_step": before, "lost": lost}
                | {"survived": fine and lost <= SAVE_STEPS, "said": said}
            )
            print(f"{script}: {fault} after step {before}: {verdict(rows[-1])}", flush=True)
        finally:
            subprocess.run(["umount", str(mounted)], check=True)
    return rows


def lost_peer(folder: Path, data: list[str]) -> list[dict]:
    """Kill one of two processes: the other stops, and the run resumes."""
    whole, run = Run("lm", folder / "pair", data), Run("lm", folder / "widowed", data)
    for process in whole.pair():
        process.join()
    expected = results(whole.folder())
    left, lost = run.pair()
    while lost.steps.value < 7:
        time.sleep(0.01)
    lost.kill()
    start = time.perf_counter()
    left.join(120)
    seconds, before, said = time.perf_counter() - start, left.steps.value, run.said()
    again = run.pair("--resume=auto")
    for process in again:
        process.join()
    repeated = max(0, before + again[0].steps.value - expected["records"][-1]["step"])
    fine = left.exitcode == 75 and said.startswith("error: another process of this job ended")
    fine = fine and seconds < 60 and same(results(run.folder()), expected)
    row = {"script": "lm", "fault": "one of two processes killed", "at_step": before}
    row |= {"lost": repeated, "survived": fine and repeated <= SAVE_STEPS, "said": said}
    print(f"lm: one of two processes killed, the other ended {seconds:.1f} s later: {verdict(row)}")
    return [{**row, "seconds": round(seconds, 1)}]


def data_of(script: str, folder: Path) -> list[str]:
    """What a script trains on."""
    if script == "lm":
        path = folder / "book.txt"
        path.write_text(Path(argparse.__file__).read_text()[:20_000])
        return ["--data.name=files", f"--data.root={path}"]
    if script == "cls":
        return []
    make_scenes(folder / "scenes", Scenes(train=32, held_out=10))
    options = []
    for part, split in (("train", "train"), ("val", "validation")):
        images, annotations = scene_paths(folder / "scenes", split)
        options += [f"--data.{part}_images={images}", f"--data.{part}_annotations={annotations}"]
    return options


def page(rows: list[dict[str, Any]], command: str, facts: dict[str, Any]) -> str:
    lines = [
        "# Faults that training runs survive",
        "",
        f"`{command}` writes this page: {facts['processor']}, torch {facts['torch']}, "
        f"{facts['date']}. Tiny models save a state every {SAVE_STEPS} steps and every epoch.",
        "A fault stops the run; the same command with `--resume auto` resumes it. The run",
        "*survives* if its weights, averaged weights, best weights and metrics equal those of an",
        f"undisturbed run bit for bit, and at most {SAVE_STEPS} steps were repeated.",
        "",
        "- *SIGKILL: time*: the process is killed at a random time.",
        "- *SIGKILL: file operation*: at a random file operation.",
        "- *SIGKILL: within a state*: while a state is being written.",
        "- *full disk*, *read-only folder*: a write fails.",
        "- *one of two processes killed*: the other process stops too.",
        "",
        "| script | fault | tried | survived | steps repeated, mean | most |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((f"train_{row['script']}.py", row["fault"]), []).append(row)
    for (script, fault), found in groups.items():
        lost = [row["lost"] for row in found]
        survived = sum(row["survived"] for row in found)
        mean = sum(lost) / len(lost)
        lines.append(
            f"| `{script}` | {fault} | {len(found)} | {survived} | {mean:.1f} | {max(lost)} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scripts", nargs="+", choices=["cls", "det", "lm"])
    parser.add_argument("--kills", type=int, default=20, help="of each script")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-page", action="store_true", help="print only")
    given = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for script in given.scripts or ["cls", "det", "lm"]:
            place = folder / script
            place.mkdir()
            data = data_of(script, place)
            rows += kills(script, place, data, given.kills, given.seed)
            rows += disks(script, place, data)
            if script == "lm":
                rows += lost_peer(place, data)
    survived, lost = sum(row["survived"] for row in rows), sum(row["lost"] for row in rows)
    print(f"{len(rows)} faults tried, {survived} survived, {lost} steps repeated in all")
    if not given.no_page:
        command = " ".join(["python benchmarks/faults.py", *(argv or sys.argv[1:])])
        facts = machine()
        save("faults", {"command": command, "machine": facts, "faults": rows})
        (ROOT / "docs" / "results" / "faults.md").write_text(page(rows, command, facts))
    return int(survived < len(rows))


if __name__ == "__main__":
    sys.exit(main())
