"""Fashion-MNIST for benchmarks/ablation.py: data, recipe, tables.

The recipe was tuned on the plain model alone (learned absolute embedding), trained on the first
50,000 training images and judged on the last 10,000.
"""

import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ablation_runs import test
from ablation_tables import SEVERAL, Cell, Line, Study, Table, pairs
from canvases import resized, widened
from fashion_learned import learned, report
from measure import machine
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import irpe
from training.data.fashion import NAMES, Fashion
from training.seeding import derive

SIDE = 28
MEAN, STD = 0.286, 0.353  # of the training images
RECIPE: dict[str, Any] = {
    "epochs": 6, "batch": 64, "opt": "muon", "lr": 3e-3, "weight_decay": 0.05, "warmup": 0.05,
    "clip": 1.0, "flip": 0.5, "pos_std": 0.5, "dim": 64, "depth": 2, "heads": 4, "mlp": 4.0,
    "patch": 4, "train": "train+validation", "test": "test", "images": None, "tests": 2000,
}  # fmt: skip
QUICK = {**RECIPE, "epochs": 1, "dim": 16, "depth": 1, "images": 640, "tests": 50}
# Sides in pixels, and rectangles, that models are tested at beside SIDE.
SIDES = (20, 36, 42, 56)
PADDED = ((28, 42), (42, 28))
STRETCHED = ((28, 42), (42, 28))
HEAD = """# Image encodings on Fashion-MNIST

60,000 training images and 10,000 test images of 28x28 pixels, ten classes. timm's ViT: {depth}
blocks of width {dim} with {heads} heads, patches of {patch}, average pooling. {epochs} epochs in
batches of {batch}, timm's Muon (AdamW for vectors and embeddings), learning rate {lr:g}, weight
decay {weight_decay:g}; images are mirrored with probability {flip:g}. The recipe was tuned on the
plain model (absolute only) alone, on the last 10,000 training images; all rows have it. Each run
reads the test images once.

Accuracy in percent, mean over seeds ± half of its 95 % interval (Student). Differences are taken
seed by seed. A difference is claimed where its interval excludes 0, and is a tie otherwise. Many
are tested here: of twenty that do not exist, one will be claimed."""


def build(cell: Cell, seed: int, recipe: dict[str, Any]) -> nn.Module:
    """timm's VisionTransformer with the cell's encoding; of one seed, all start alike."""
    torch.manual_seed(derive(seed, "weights"))
    model = VisionTransformer(
        img_size=SIDE, patch_size=recipe["patch"], in_chans=1, num_classes=len(NAMES),
        embed_dim=recipe["dim"], depth=recipe["depth"], num_heads=recipe["heads"],
        mlp_ratio=recipe["mlp"], class_token=False, global_pool="avg", weight_init="jax",
        dynamic_img_size=True, dynamic_img_pad=True,
    )  # fmt: skip
    nn.init.normal_(model.pos_embed, std=recipe["pos_std"])
    if not cell.absolute:
        model.pos_embed = None
    if cell.encoding is not None:
        irpe.attach(model, cell.encoding)
    return model


def grid(recipe: dict[str, Any]) -> irpe.Grid:
    return irpe.Grid(SIDE // recipe["patch"], SIDE // recipe["patch"])


@cache
def images(split: str) -> tuple[Tensor, Tensor]:
    """Return the images of a split, uint8 ``[N, 1, 28, 28]``, and their classes ``[N]``."""
    source = Fashion(split)
    return torch.tensor(source.pixels).unsqueeze(1), torch.tensor(source.targets).long()


def normalised(pixels: Tensor) -> Tensor:
    return (pixels.float() / 255 - MEAN) / STD


def train(model: nn.Module, steps: int, seed: int, recipe: dict[str, Any]) -> None:
    """Train for one cycle; each epoch has its own order, images are mirrored at random."""
    pixels, classes = (x[: recipe["images"]] for x in images(recipe["train"]))
    generator = torch.Generator().manual_seed(derive(seed, "order"))
    given = {name: recipe[name] for name in ("opt", "lr", "weight_decay")}
    optimizer = create_optimizer_v2(model, **given)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe["lr"], steps, pct_start=recipe["warmup"], cycle_momentum=False
    )
    order: Tensor = torch.empty(0, dtype=torch.long)
    model.train()
    for _ in range(steps):
        if len(order) < recipe["batch"]:
            order = torch.randperm(len(pixels), generator=generator)
        own, order = order[: recipe["batch"]], order[recipe["batch"] :]
        batch = pixels[own]
        mirrored = torch.rand(len(own), 1, 1, 1, generator=generator) < recipe["flip"]
        batch = torch.where(mirrored, batch.flip(3), batch)
        optimizer.zero_grad()
        F.cross_entropy(model(normalised(batch)), classes[own]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe["clip"])
        optimizer.step()
        cycle.step()


def execute(cell: Cell, seed: int, recipe: dict[str, Any]) -> Line:
    """Train and test one model on one thread; return its line."""
    torch.set_num_threads(1)
    start, cpu = time.perf_counter(), time.process_time()
    count = len(images(recipe["train"])[0][: recipe["images"]])
    steps = int(cell.budget * recipe["epochs"] * (count // recipe["batch"]))
    model = build(cell, seed, recipe)
    train(model, steps, seed, recipe)
    trained = time.process_time() - cpu
    pixels, classes = images(recipe["test"])
    accuracy, loss = test(model, (normalised(pixels), classes))
    few, own = normalised(pixels[: recipe["tests"]]), classes[: recipe["tests"]]
    line = {
        "key": f"{cell.key} | seed {seed}", "cell": cell.key, "seed": seed,
        "accuracy": accuracy, "loss": loss, "step_cpu_ms": round(1000 * trained / steps, 2),
    }  # fmt: skip
    if seed == 0:
        line["learned"] = learned(model, cell, few, grid(recipe))
    if cell.sizes:
        tests = {f"{side}x{side}": resized(few, side) for side in SIDES}
        # Of empty pixels, which are not zero once they are normalised.
        blank = float(normalised(torch.zeros(())))
        tests |= {f"{h}x{w}": widened(few - blank, h, w, seed) + blank for h, w in PADDED}
        tests |= {
            f"{h}x{w} stretched": F.interpolate(few, hw, mode="bilinear", antialias=True)
            for hw in STRETCHED
            for h, w in [hw]
        }
        line["sizes"] = {name: test(model, (x, own))[0] for name, x in tests.items()}
    line["seconds"] = round(time.perf_counter() - start, 1)
    line["cpu_seconds"] = round(time.process_time() - cpu, 1)
    return {**line, "recipe": recipe, "machine": machine()}


def _cells() -> dict[str, Cell]:
    k, qkv = SEVERAL["k"], SEVERAL["qkv"]
    return {
        "none": Cell(None, False, sizes=True),
        "absolute only": Cell(sizes=True),
        "k": Cell(k, False, sizes=True),
        "qkv": Cell(qkv, False, sizes=True),
        "absolute + k": Cell(k, sizes=True),
        "absolute + qkv": Cell(qkv, sizes=True),
        "rope-axial": Cell("rope-axial", False, sizes=True),
        "rope-mixed": Cell("rope-mixed", False, sizes=True),
        "rope-axial + k": Cell(f"rope-axial + {k}", False, sizes=True),
        "lookhere": Cell("lookhere", False, sizes=True),
    }


def _tables() -> dict[str, Table]:
    cells = _cells()
    others = [name for name in cells if name not in ("none", "absolute only")]
    beside = [("absolute only", "none"), *((name, "absolute only") for name in others)]
    beside += [("qkv", "k"), ("qkv", "rope-axial"), ("rope-axial + k", "rope-axial")]
    some = ("absolute only", "k", "qkv", "rope-axial")
    shares = (0.5, 1.0, 2.0)
    budget = {
        f"{row}, {share:.0%}": Cell(
            cells[row].encoding, cells[row].absolute, sizes=share == 1.0, budget=share
        )
        for row in some
        for share in shares
    }
    lengths = [(f"{row}, {s:.0%}", f"absolute only, {s:.0%}") for s in shares for row in some[1:]]
    return {
        "fashion": Table(
            "Encodings", "Product, contextual, shared (k, qkv).", cells, {}, pairs(*beside)
        ),
        "fashion_sizes": Table(
            "Trained at one size, tested at others",
            "Squares: the same images at another resolution, patches as before (at 42 pixels timm "
            "pads to 44). Rectangles: the same images somewhere on a wider or taller empty one, or "
            "stretched. Tables stay as they are; the absolute embedding is resized by timm. The "
            "first 2,000 test images.",
            cells,
            {},
            pairs(*((name, "absolute only") for name in others)),
            kind="sizes",
        ),
        "fashion_budget": Table(
            "Length of training",
            "Each length is a schedule of its own; 100%: that of the other tables.",
            budget,
            {},
            pairs(*lengths),
            kind="budget",
        ),
    }


def _learned(lines: Sequence[Line], out: Path) -> list[str]:
    return report(lines, _cells(), grid(lines[0]["recipe"]), out, "fashion")


FASHION = Study("fashion", _tables(), RECIPE, QUICK, execute, HEAD, SIDE, _learned)
