"""The runs of benchmarks/text.py: their list, and a function that executes one of them."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from measure import interleaved, machine, peak_above, ratio, resident

import train_lm
from models.text import CausalLM
from training import config as configuration
from training.distributed import make_accelerator
from training.lm import run as lm_run
from training.lm.language import Held, Language
from training.lm.model import build_language_model
from training.lm.options import LmConfig
from training.lm.run import open_text
from training.run import start
from training.text.staged import TextPlan

ROOT = Path(__file__).parents[1]
ENCODINGS = {
    "none": "null",
    "sinusoidal": "sinusoidal",
    "learned": "learned,length=512",
    "rope": "rope",
    "alibi": "alibi",
    "t5": "t5",
    "shaw": "shaw,clip=64",
    **{f"M{n}": f"huang{n},clip=64" for n in (1, 2, 3, 4)},
}
WINDOWS = (128, 256, 512)  # of the sliding baselines
LONG = {"rope": "rope", "learned": "learned,length=128,interpolate=left,to=512", "alibi": "alibi"}
BASES = {**LONG, "learned": "learned,length=128"}
# Toy sizes, which prove the script and nothing else.
QUICK = (
    "--epochs=2", "--steps_per_epoch=2", "--sched.warmup_epochs=0", "--budget=2048",
    "--eval_tokens=2100", "--model.dim=16", "--model.depth=1", "--eval_batch_size=2",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A command of train_lm.py.

    Attributes:
        experiment, name, seed: together the key of the run.
        config: name of a file in configs/lm.
        options: further options of the command.
        after: name of the run whose weights it starts from.
        scores_only: score these weights without training.
    """

    experiment: str
    name: str
    seed: int
    config: str
    options: tuple[str, ...] = ()
    after: str | None = None
    scores_only: bool = False

    @property
    def key(self) -> str:
        return f"{self.experiment} {self.name} seed {self.seed}"

    @property
    def folder(self) -> str:
        return self.key.replace(" ", "-")


def lengths(seed: int) -> list[Run]:
    """(1) Every encoding, scored at its training length and at two and four times that length."""
    return [
        Run("lengths", name, seed, "lengths", (f"--encoding={spec}",))
        for name, spec in ENCODINGS.items()
    ]


def staged(seed: int) -> list[Run]:
    """(2) Staged training, its baseline (long windows only) and a control (short windows only)."""
    return [
        Run("staged", "long", seed, "staged", ("--stages=[{length: 2048}]",)),
        Run("staged", "staged", seed, "staged"),
        Run("staged", "short", seed, "staged", ("--stages=[{length: 128}]",)),
    ]


def shortformer(seed: int) -> list[Run]:
    """(3) Shortformer, PIA without stages, and sliding windows, all with equal training tokens."""
    runs = [
        Run("shortformer", "shortformer", seed, "shortformer"),
        Run("shortformer", "pia", seed, "shortformer", ("--stages=[{length: 128}]",)),
    ]
    plain = ("--encoding=sinusoidal", "--order=shuffled", "--memory=0", "--sample=0")
    for window in WINDOWS:
        protocols = f"[{{length: {window}}}, {{kind: token, length: {window}}}]"
        own = (f"--stages=[{{length: {window}}}]", f"--protocols={protocols}")
        name = f"sliding {window}"
        runs.append(Run("shortformer", name, seed, "shortformer", (*plain, *own)))
    return runs


def segments(seed: int) -> list[Run]:
    """(4) Chunks of a text four times as long, and plain, twice as long and full windows."""
    first = ("--segments.method=none", "--epochs=10", "--steps_per_epoch=60", "--optim.lr=0.003")
    runs = [Run("segments", "none base", seed, "segments", ("--encoding=null", *first))]
    for name, spec in LONG.items():
        own = f"--encoding={spec}"
        base = (f"--encoding={BASES[name]}", *first)
        if name == "learned":  # its table ends at the training length
            base += ("--protocols=[{length: 128}, {kind: sliding, length: 128, stride: 32}]",)
        runs.append(Run("segments", f"{name} base", seed, "segments", base))
        after = {"config": "segments", "after": f"{name} base"}
        if name == "learned":
            runs.append(
                Run(
                    "segments",
                    f"{name} interpolated",
                    seed,
                    options=(own,),
                    scores_only=True,
                    **after,
                )
            )
        plain = (own, "--segments.method=none")
        for kind, options in {
            "plain": plain,
            "chunk": (own,),
            "twice": (*plain, "--stages=[{length: 256}]"),
            "full": (own, "--segments.method=full"),
        }.items():
            runs.append(Run("segments", f"{name} {kind}", seed, options=options, **after))
    return runs


EXPERIMENTS = {f.__name__: f for f in (lengths, staged, shortformer, segments)}


def arguments_of(run: Run, runs: Path, quick: bool, threads: int) -> list[str]:
    """Return the command line of a run whose folder is in ``runs``."""
    given = [f"--config={ROOT / 'configs' / 'lm' / run.config}.yaml", *run.options]
    if quick:
        given += QUICK
        if run.experiment == "lengths" or run.experiment == "segments":
            given.append("--model.num_heads=2")
    if run.after is not None:
        base = Run(run.experiment, run.after, run.seed, run.config)
        given.append(f"--checkpoint={runs / base.folder / 'checkpoints' / 'last.safetensors'}")
    given += [f"--seed={run.seed}", f"--run.threads={threads}", "--run.device=cpu"]
    return [*given, f"--run.output={runs}", f"--run.experiment={run.folder}"]


def execute(run: Run, runs: Path, quick: bool, threads: int) -> dict[str, Any]:
    """Execute a run, or resume it; return its line of results."""
    given = arguments_of(run, runs, quick, threads)
    line: dict[str, Any] = {
        "key": run.key, "experiment": run.experiment, "name": run.name, "seed": run.seed,
        "config": run.config, "options": list(run.options), "quick": quick, "machine": machine(),
    }  # fmt: skip
    if run.scores_only:
        return {**line, "scores": start(parsed(given), lm_run.open_task), "curve": []}
    folder = runs / run.folder
    if not (folder / "scores.json").exists():
        status = train_lm.main([*given, "--resume=auto"])
        if status:
            sys.exit(f"error: {run.key} ended with status {status}")
    records = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    cpu, curve = 0.0, []
    for record in records:
        cpu += record["train_cpu_seconds"]
        values = {name: record[name] for name in ("step", "bits_per_byte", "tokens_per_second")}
        curve.append({**values, "train_cpu_seconds": cpu})
    scores = json.loads((folder / "scores.json").read_text())
    return {**line, "scores": scores, "curve": curve}


def parsed(arguments: Sequence[str]) -> LmConfig:
    return configuration.parse(LmConfig, list(arguments), "train_lm.py")


def speed(runs: Path, seed: int, quick: bool, threads: int) -> dict[str, Any]:
    """Return the time per generated token of the models trained in (3).

    PIA reads a token and its memory; a sliding window is recomputed for every token.
    """
    torch.set_num_threads(threads)
    cells, count = {}, 4 if quick else 32
    with torch.no_grad():
        for name in ("pia", *(f"sliding {window}" for window in WINDOWS)):
            run = Run("shortformer", name, seed, "shortformer")
            config = parsed([f"--config={runs / run.folder / 'config.yaml'}"])
            file = runs / run.folder / "checkpoints" / "last.safetensors"
            config.checkpoint = str(file)
            model = build_language_model(config, 256).eval()
            length = config.stages[-1].length
            cells[name] = (
                _reading(model, length, count) if name == "pia" else _sliding(model, length, count)
            )
        times = interleaved(cells, 3 if quick else 15)
    base = times["pia"]
    rows = {
        name: {"ms": 1e3 * sorted(found)[len(found) // 2] / count, "over_pia": ratio(found, base)}
        for name, found in times.items()
    }
    return {
        "key": f"speed seed {seed}", "experiment": "speed", "seed": seed, "quick": quick,
        "tokens": count, "rows": rows, "machine": machine(),
    }  # fmt: skip


def _reading(model: CausalLM, length: int, count: int) -> Any:
    tokens = torch.randint(
        256, (1, length + length // 2), generator=torch.Generator().manual_seed(0)
    )
    _, state = model(tokens, state=model.memory(length))

    def run() -> None:
        now = state
        for place in range(count):
            _, now = model(tokens[:, place : place + 1], state=now)

    return run


def _sliding(model: CausalLM, length: int, count: int) -> Any:
    tokens = torch.randint(256, (1, length + count), generator=torch.Generator().manual_seed(0))

    def run() -> None:
        for place in range(count):
            model(tokens[:, place : place + length])[:, -1]

    return run


def memory(run: Run, quick: bool) -> float:
    """MiB that a training step takes at its peak, the model included; in a process of its own."""
    config = parsed(arguments_of(run, Path("runs"), quick, 1))
    config.checkpoint = None
    accelerator = make_accelerator(config.run)
    tokens, (stream, held_out) = open_text(config.data, accelerator, "train", "validation")
    plan = TextPlan(len(stream), config)
    config.protocols, config.eval_batch_size = config.protocols[:1], 1
    held = Held(config, accelerator, held_out, tokens.byte_counts, 128)
    config.steps_per_epoch = 2
    before = resident()
    model = build_language_model(config, 256)
    task = Language(config, accelerator, model, held, tokens, plan, [stream, held_out])
    for step, batch in enumerate(task.batches(0)):
        task.loss(model, batch, step).loss.backward()
        model.zero_grad()
    return peak_above(before)
