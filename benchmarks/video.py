"""Encodings on three axes, in small: which way do digits move, and how far apart are they?

    python benchmarks/video.py                        # seeds 0 to 4: docs/results/video.md
    python benchmarks/video.py --quick --out /tmp/trial    # toy sizes: proves the script

Each run leaves a line in a file of JSON lines; started again, the script does what is missing. A
run has one thread. The page is made of the lines that there are.
"""

import argparse
import json
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measure import machine, student
from torch import Tensor, nn

import irpe
from training.data.digits import Digits

ROOT = Path(__file__).parents[1]
LINES = ROOT / "benchmarks" / "results" / "video.jsonl"
PAGE = ROOT / "docs" / "results" / "video.md"
SPECS = {
    "no encoding": None,
    "product on keys": "rpe-1.9-product-ctx-1-k",
    "cross on keys": "rpe-1.9-cross-ctx-1-k",
    "euc on keys": "rpe-3.0-euc-ctx-1-k",
    "quant on keys": "rpe-9.0-quant-ctx-1-k",
    "T5 by axis": "t5-axes,buckets=8,max=8",
    "ALiBi": "alibi",
    "ALiBi, steep": "alibi,span=2",
    "axial rotary": "rope-axial",
    "mixed rotary": "rope-mixed",
}
RECIPE: dict[str, Any] = {
    "steps": 500, "batch": 32, "lr": 2e-3, "table_lr": 1e-2, "weight_decay": 0.05, "warmup": 0.1,
    "dim": 48, "depth": 2, "heads": 4, "patch": 4, "frames": 4, "side": 16, "tests": 800,
}  # fmt: skip
QUICK = {**RECIPE, "steps": 4, "batch": 4, "tests": 16}
DIRECTIONS = ((-1, 0), (1, 0), (0, -1), (0, 1))
SPEEDS = (1, 2)  # pixels a frame
SCANS = 6
WITHIN = (1.5, 2.5, 6.0)  # of a cell, in patches and frames; the last is the whole video


class Moves:
    """Scans of digits that move over an empty canvas; the class is the direction and the speed."""

    classes = len(DIRECTIONS) * len(SPEEDS)

    def __init__(self, split: str, seed: int, recipe: dict[str, Any]) -> None:
        digits = Digits(split)
        scans = [np.asarray(digits.read(n)[0], np.float32) / 255 for n in range(len(digits))]
        self.scans, self.rng, self.recipe = np.stack(scans), np.random.default_rng(seed), recipe

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Return videos ``[count, 1, frames, side, side]`` and their classes."""
        frames, side = self.recipe["frames"], self.recipe["side"]
        videos = np.zeros((count, 1, frames, side, side), np.float32)
        classes = self.rng.integers(self.classes, size=count)
        for video, kind in zip(videos, classes, strict=True):
            scan = self.scans[self.rng.integers(len(self.scans))]
            step = np.multiply(DIRECTIONS[kind // len(SPEEDS)], SPEEDS[kind % len(SPEEDS)])
            way = step * (frames - 1)
            low, high = np.maximum(-way, 0), side - 8 - np.maximum(way, 0)
            start = self.rng.integers(low, high + 1)
            for n in range(frames):
                y, x = start + n * step
                video[0, n, y : y + 8, x : x + 8] = scan
        return torch.from_numpy(videos), torch.from_numpy(classes)


class Clusters(Moves):
    """Small scans of digits, each in one patch of one frame; the class is how close they are.

    They lie at random within a distance of a random cell, over patches and frames.
    """

    classes = len(WITHIN)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        frames, side, patch = (self.recipe[name] for name in ("frames", "side", "patch"))
        cells = np.stack(np.indices((frames, side // patch, side // patch)), -1).reshape(-1, 3)
        distances = np.linalg.norm(cells[:, None] - cells, axis=-1)
        videos = np.zeros((count, 1, frames, side, side), np.float32)
        classes = self.rng.integers(self.classes, size=count)
        for video, kind in zip(videos, classes, strict=True):
            near = np.flatnonzero(self.rng.choice(distances) <= WITHIN[kind])
            for t, row, column in cells[self.rng.choice(near, SCANS, replace=False)]:
                scan = self.scans[self.rng.integers(len(self.scans))]
                y, x = row * patch, column * patch
                small = scan.reshape(patch, 8 // patch, patch, 8 // patch).mean((1, 3))
                video[0, t, y : y + patch, x : x + patch] = small
        return torch.from_numpy(videos), torch.from_numpy(classes)


TASKS = {"direction": Moves, "distance": Clusters}


class Model(nn.Module):
    """Patches of one frame each, blocks of attention with an encoding, and the mean of all."""

    def __init__(self, spec: str | None, classes: int, recipe: dict[str, Any]) -> None:
        super().__init__()
        dim, patch = recipe["dim"], recipe["patch"]
        side = recipe["side"] // patch
        self.volume = irpe.Volume(recipe["frames"], side, side)
        self.embed = nn.Conv3d(1, dim, (1, patch, patch), stride=(1, patch, patch))
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.LayerNorm(dim),
                    irpe.RPEAttention(dim, recipe["heads"], spec, axes=3),
                    nn.Sequential(
                        nn.LayerNorm(dim),
                        nn.Linear(dim, 2 * dim),
                        nn.GELU(),
                        nn.Linear(2 * dim, dim),
                    ),
                ]
            )
            for _ in range(recipe["depth"])
        )
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for norm, attention, mlp in self.blocks:
            x = x + attention(norm(x), self.volume)
            x = x + mlp(x)
        return self.head(x.mean(1))


def execute(task: str, name: str, seed: int, recipe: dict[str, Any]) -> dict[str, Any]:
    """Train and test one model; return its line."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    start, kind = time.process_time(), TASKS[task]
    model, encoded = (Model(spec, kind.classes, recipe) for spec in (None, SPECS[name]))
    encoded.load_state_dict(model.state_dict(), strict=False)  # the same first weights for all
    videos = kind("train", seed, recipe)
    given = {"lr": recipe["lr"], "weight_decay": recipe["weight_decay"]}
    groups = [{"params": list(encoded.parameters()), **given}]
    if SPECS[name] is not None:
        groups = irpe.param_groups(encoded, **given, table_lr=recipe["table_lr"])
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [g["lr"] for g in groups], recipe["steps"], pct_start=recipe["warmup"]
    )
    for _ in range(recipe["steps"]):
        x, y = videos.draw(recipe["batch"])
        loss = F.cross_entropy(encoded(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(encoded.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    x, y = kind("validation", 1000 + seed, recipe).draw(recipe["tests"])
    with torch.no_grad():
        right = (encoded.eval()(x).argmax(-1) == y).float().mean().item()
    return {
        "task": task, "name": name, "spec": SPECS[name], "seed": seed, "accuracy": 100 * right,
        "loss": loss.item(), "cpu_s": time.process_time() - start, "recipe": recipe,
        "machine": machine(),
    }  # fmt: skip


def spread(values: Sequence[float]) -> str:
    """Mean and half of the 95 % interval."""
    mean, half = student(values) if len(values) > 1 else (values[0], float("nan"))
    return f"{mean:.1f} ± {half:.1f}"


def table(lines: list[dict[str, Any]]) -> str:
    """The rows of one task."""
    by_name = {
        name: {x["seed"]: x["accuracy"] for x in lines if x["name"] == name} for name in SPECS
    }
    plain, rows = by_name["no encoding"], []
    for name, found in by_name.items():
        seeds = sorted(set(found) & set(plain))
        if not seeds:
            continue
        gains = [found[s] - plain[s] for s in seeds]
        mean, half = student(gains) if len(gains) > 1 else (gains[0], float("inf"))
        said = "" if name == "no encoding" else spread(gains)
        said += (
            "" if not said else ", above" if mean > half else ", below" if -mean > half else ", tie"
        )
        spec = f"`{SPECS[name]}`" if SPECS[name] else ""
        rows.append(f"| {name} | {spec} | {spread([found[s] for s in seeds])} | {said} |")
    return "\n".join(rows)


def page(lines: list[dict[str, Any]]) -> str:
    """The page of these lines."""
    tables = {task: table([line for line in lines if line["task"] == task]) for task in TASKS}
    chances = {f"{task}_chance": 100 / kind.classes for task, kind in TASKS.items()}
    seeds = ", ".join(map(str, sorted({line["seed"] for line in lines})))
    machines = [line["machine"] for line in lines]
    used = {key: ", ".join(sorted({m[key] for m in machines})) for key in ("processor", "torch")}
    facts = lines[0]["recipe"] | used | tables | chances
    dates = sorted({m["date"] for m in machines})
    facts["date"] = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return TEXT.format(**facts, seeds=seeds, scans=SCANS, within=", ".join(map(str, WITHIN)))


TEXT = """# Encodings of videos, in small

Two tasks on videos of {frames} frames and {side}x{side} pixels, made of scans of digits (held-out
ones for testing). The model has {depth} blocks of width {dim} with {heads} heads, patches of
{patch}x{patch} pixels of one frame, no other position, {steps} steps of {batch} videos, AdamW,
learning rate {lr:g} (tables {table_lr:g}); tested on {tests} videos. Nothing was tuned.

Accuracy in percent, mean over seeds ± half of its 95 % interval (Student). Differences are taken
seed by seed: of one seed, all models have the same first weights, training and test videos. *Above*
and *below* are said where the interval excludes 0.

## Direction

A scan moves over an empty canvas: in which of four directions, and with one pixel a frame or two?
Chance is {direction_chance:.1f} %. Without positions a model sees patches in no order, so what it
has above chance comes from how patches cut the digits. `euc`, `quant` and ALiBi see distances
alone: no direction, and a speed of one or two pixels a frame is less than a patch.

| encoding | spec | accuracy | above no encoding |
|---|---|---|---|
{direction}

## Distance

Scans made as small as a patch ({scans} of them) lie within a distance of a random cell of the
video: {within} patches and frames (Euclidean). Which of these? Chance is {distance_chance:.1f} %;
scans spread over the whole video are at times close by chance. ALiBi's slopes (for four heads 1/4
to 1/256) are made for texts; with `span=2` (0.7 to 0.25) it learns this in the same steps.

| encoding | spec | accuracy | above no encoding |
|---|---|---|---|
{distance}

Written by `python benchmarks/video.py` from `benchmarks/results/video.jsonl`: seeds {seeds},
{processor}, one thread, torch {torch}, {date}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="default: 0 to 4")
    parser.add_argument("--quick", action="store_true", help="toy sizes, seeds 0 and 1")
    parser.add_argument("--out", type=Path, help="folder of lines and page")
    given = parser.parse_args()
    if given.quick and given.out is None:
        parser.error("--quick needs --out: its figures mean nothing")
    recipe = QUICK if given.quick else RECIPE
    file = LINES if given.out is None else given.out / LINES.name
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []
    if any(line["recipe"] != recipe for line in lines):
        parser.error(f"{file} holds runs of another recipe: move it away, or name another --out")
    done = {(line["task"], line["name"], line["seed"]) for line in lines}
    seeds = given.seeds or ([0, 1] if given.quick else range(5))
    for task, seed, name in product(TASKS, seeds, SPECS):
        if (task, name, seed) not in done:
            line = execute(task, name, seed, recipe)
            with file.open("a") as out:
                out.write(json.dumps(line) + "\n")
            lines.append(line)
            print(f"{task}, {name}, seed {seed}: {line['accuracy']:.1f} %", flush=True)
    target = PAGE if given.out is None else given.out / PAGE.name
    target.write_text(page(lines))
    print("written to", target)


if __name__ == "__main__":
    main()
