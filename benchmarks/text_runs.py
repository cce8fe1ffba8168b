"""The runs behind benchmarks/text.py: which there are, and one at a time to its line of figures."""

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
from training.engine import make_accelerator
from training.lm import run as lm_run
from training.lm.data import open_text
from training.lm.language import Held, Language
from training.lm.model import build_language_model
from training.lm.options import LmConfig

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
LONG = {"rope": "rope", "learned": "learned,length=128,stretch=left,to=512", "alibi": "alibi"}
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
        experiment, name, seed: what it is for; together they are its key.
        config: in configs/lm. options: behind it.
        after: name of the run whose weights it starts from.
        scores_only: whether those are scored as they are.
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
    """(1) Every encoding at the length that it was trained at, twice and four times that."""
    return [
        Run("lengths", name, seed, "lengths", (f"--encoding={spec}",))
        for name, spec in ENCODINGS.items()
    ]


def staged(seed: int) -> list[Run]:
    """(2) Staged training, its baseline of long windows, and a control of short ones alone."""
    return [
        Run("staged", "long", seed, "staged", ("--stages=[{length: 2048}]",)),
        Run("staged", "staged", seed, "staged"),
        Run("staged", "short", seed, "staged", ("--stages=[{length: 128}]",)),
    ]


def shortformer(seed: int) -> list[Run]:
    """(3) Shortformer, PIA without stages, and sliding windows at equal training tokens."""
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
    """(4) Chunks of a text four times as long, beside windows that are plain, twice, or whole."""
    first = ("--segments.method=none", "--epochs=10", "--steps_per_epoch=60", "--optim.lr=0.003")
    runs = [Run("segments", "none base", seed, "segments", ("--encoding=null", *first))]
    for name, spec in LONG.items():
        own = f"--encoding={spec}"
        base = (f"--encoding={BASES[name]}", *first)
        if name == "learned":  # its table ends at the length that it is trained at
            base += ("--protocols=[{length: 128}, {kind: sliding, length: 128, stride: 32}]",)
        runs.append(Run("segments", f"{name} base", seed, "segments", base))
        after = {"config": "segments", "after": f"{name} base"}
        if name == "learned":
            runs.append(
                Run(
                    "segments", f"{name} stretched", seed, options=(own,), scores_only=True, **after
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
    """The command line of a run, whose folder is in ``runs``."""
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
    """Run it, or go on with it where it was interrupted; return its line of figures."""
    given = arguments_of(run, runs, quick, threads)
    line: dict[str, Any] = {
        "key": run.key, "experiment": run.experiment, "name": run.name, "seed": run.seed,
        "config": run.config, "options": list(run.options), "quick": quick, "machine": machine(),
    }  # fmt: skip
    if run.scores_only:
        return {**line, "scores": lm_run.evaluate(parsed(given)), "curve": []}
    folder = runs / run.folder
    if not (folder / "scores.json").exists():
        status = train_lm.main([*given, "--resume=auto"])
        if status:
            sys.exit(f"error: {run.key} ended with status {status}")
    records = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    cpu, curve = 0.0, []
    for record in records:
        cpu += record["train_cpu_seconds"]
        figures = {name: record[name] for name in ("step", "bits_per_byte", "tokens_per_second")}
        curve.append({**figures, "train_cpu_seconds": cpu})
    scores = json.loads((folder / "scores.json").read_text())
    return {**line, "scores": scores, "curve": curve}


def parsed(arguments: Sequence[str]) -> LmConfig:
    return configuration.parse(LmConfig, list(arguments), "train_lm.py")


def speed(runs: Path, seed: int, quick: bool, threads: int) -> dict[str, Any]:
    """Time of a token that is generated, of models that were trained in (3).

    PIA reads a token and its memory; a window that slides is read anew for each token.
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
    plan = lm_run.make_plan(config, len(stream))
    held = Held(
        accelerator, held_out, tokens.byte_counts, config.protocols[:1], length=128, batch_size=1
    )
    task = Language(accelerator, plan, stream, held, steps_per_epoch=2)
    before = resident()
    model = build_language_model(config, 256)
    for step, batch in enumerate(task.batches(0)):
        task.loss(model, batch, step).loss.backward()
        model.zero_grad()
    return peak_above(before)
