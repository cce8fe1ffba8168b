"""Runs of the scripts on tiny models, each a process of its own, and faults to put into them."""

import ctypes
import io
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import train_cls
import train_det
import train_lm
from training.loop import Loop
from training.run_directory import finished

Fault = Callable[[Path], None]
FORK = multiprocessing.get_context("fork")  # a run then costs no imports
SAVE_STEPS = 2
COMMON = [
    f"--run.save_steps={SAVE_STEPS}", "--run.progress=none", "--run.threads=1", "--run.device=cpu",
    "--epochs=3", "--ema.enabled", "--ema.decay=0.9",
]  # fmt: skip
TEXT = ["--model.dim=16", "--model.depth=2", "--model.num_heads=2", "--steps_per_epoch=4"]
TEXT += ["--budget=128", "--stages=[{length: 8, until: 5}, {length: 16}]", "--eval_tokens=300"]
TEXT += ["--order=stripes", "--memory=1", "--model.drop=0.1", "--sample=20", "--encoding=rope"]
IMAGES = ["--model.name=vit_tiny_patch16_224", "--model.img_size=8", "--model.in_chans=1"]
IMAGES += ["--model.kwargs={patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}"]
IMAGES += ["--batch_size=256", "--eval_batch_size=360", "--model.drop_path=0.2", "--aug.mixup=0.5"]
BOXES = ["--backbone=stem", "--pretrained_backbone=false", "--hidden_dim=16", "--nheads=2"]
BOXES += ["--enc_layers=1", "--dec_layers=2", "--dim_feedforward=16", "--num_queries=4"]
BOXES += ["--aug.scales=[32, 40]", "--aug.crop_scales=[32, 48]", "--aug.crop_size=[24, 40]"]
BOXES += ["--aug.eval_size=48", "--batch_size=8", "--lr=1e-3", "--lr_backbone=1e-3"]
BOXES += ["--pictures=2", "--data.name=coco", "--enc_rpe2d=rpe-2.0-product-ctx-1-k"]
SCRIPTS: dict[str, tuple[Callable, list[str]]] = {
    "cls": (train_cls.main, [*IMAGES, "--sched.warmup_epochs=0", "--data.workers=0"]),
    "det": (train_det.main, [*BOXES, "--data.workers=0"]),
    "lm": (train_lm.main, [*TEXT, "--sched.warmup_epochs=0", "--optim.lr=0.01"]),
}
TIMES = ("seconds", "train_cpu_seconds", "images_per_second", "tokens_per_second")


class Run:
    """A script's command, in a folder; runs of it are processes of their own."""

    def __init__(self, script: str, output: Path, data: list[str]) -> None:
        self.script, self.output, self.port = script, output, 0
        self.log = output.with_name(f"{output.name}.log")
        main, options = SCRIPTS[script]
        self.main = main
        self.arguments = [*COMMON, *options, *data, f"--run.output={output}", "--run.experiment=x"]

    def start(self, *more: str, fault: Fault = lambda output: None, rank: int = 0) -> Any:
        """Start it; ``steps`` of what is returned counts the steps that it does."""
        steps = FORK.Value(ctypes.c_int, 0)

        def child() -> None:
            if self.port:
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(self.port))
                os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
            with self.log.open("a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            real = Loop._one_step

            def step(loop: Loop, *given: Any) -> int:
                count = real(loop, *given)
                steps.value += 1
                return count

            Loop._one_step = step  # type: ignore[method-assign]
            fault(self.output)
            status = self.main([*self.arguments, *more])
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)  # not the cleaning up of the process that was forked

        self.output.mkdir(parents=True, exist_ok=True)
        process = FORK.Process(target=child)
        process.start()
        process.steps = steps
        return process

    def whole(self, *more: str, **options: Any) -> tuple[int, int]:
        """Run it to its end; return its status and the steps it did."""
        process = self.start(*more, **options)
        process.join()
        return process.exitcode, process.steps.value

    def pair(self, *more: str) -> list[Any]:
        """Start two processes that find one another."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        return [self.start(*more, rank=rank) for rank in (0, 1)]

    def said(self) -> str:
        """The last line that it printed."""
        lines = self.log.read_text().splitlines()
        return lines[-1].replace(f"{self.output}/", "") if lines else ""

    def folder(self) -> Path:
        """The finished run; a run killed before its first state starts again."""
        return max(self.output.glob("x*"), key=lambda path: path.name)

    @property
    def finished(self) -> bool:
        made = [*self.output.glob("x*")]
        return bool(made) and finished(self.folder())


def results(folder: Path) -> dict[str, Any]:
    """All that must be as in the undisturbed run."""
    names = ("last", "last-ema", "best")
    weights = {name: load_file(folder / "checkpoints" / f"{name}.safetensors") for name in names}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]
    return {"weights": weights, "records": records, "made": {p.name for p in folder.iterdir()}}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    pairs = [(one["weights"][name], other["weights"][name]) for name in one["weights"]]
    return all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs
    ) and (one["records"], one["made"]) == (other["records"], other["made"])


# --- faults ---------------------------------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_operation(number: int) -> Fault:
    """Die just before the so many-th opening, renaming or removal of a file of the run."""

    def install(output: Path) -> None:
        left, events = number, ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate")

        def hook(event: str, given: tuple) -> None:
            nonlocal left
            if event in events and given and str(output) in str(given[0]):
                left -= 1
                if left == 0:
                    die()

        sys.addaudithook(hook)

    return install


def within_state(number: int, share: float) -> Fault:
    """Die when so much of the so many-th state is written."""

    def install(output: Path) -> None:
        real, left = torch.save, number

        def write(state: Any, path: Path) -> None:
            nonlocal left
            left -= 1
            if left:
                real(state, path)
                return
            buffer = io.BytesIO()
            real(state, buffer)
            with Path(path).open("wb") as file:
                file.write(buffer.getvalue()[: int(share * buffer.tell())])
                file.flush()
                die()

        torch.save = write

    return install


def read_only(output: Path) -> None:
    """Let the file system turn read-only after the fifth step."""
    real = Loop._one_step

    def step(loop: Loop, *given: Any) -> int:
        if loop.step == 5:
            subprocess.run(["mount", "-o", "remount,ro", str(output)], check=True)
        return real(loop, *given)

    Loop._one_step = step  # type: ignore[method-assign]


def count_operations(run: Run) -> tuple[int, int, int, float]:
    """Operations on files, states, steps and seconds of a run, which is left in peace."""
    counts = FORK.Array(ctypes.c_int, 2)

    def install(output: Path) -> None:
        events, real = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate"), torch.save

        def hook(event: str, given: tuple) -> None:
            if event in events and given and str(output) in str(given[0]):
                counts[0] += 1

        def write(*given: Any) -> None:
            counts[1] += 1
            real(*given)

        sys.addaudithook(hook)
        torch.save = write

    start = time.perf_counter()
    status, steps = run.whole(fault=install)
    if status:
        sys.exit(f"error: the undisturbed run ended with {status}: {run.said()}")
    return counts[0], counts[1], steps, time.perf_counter() - start
