"""The runs behind benchmarks/ablation.py: a small ViT with an encoding, from its cell to its line.

Learning rate, warm-up, width and depth were tuned on the plain model alone (learned absolute
embedding, no encoding), with seeds 1000 and 1001, of which none is reported: 3 blocks of width 32
or 48 and 2 of 64, warm-up 0.1 and 0.3, batches of 8, 16 and 32, and at last, with all else fixed,
rates 2e-3, 3e-3 and 5e-3. The number of steps is what 40 seconds allow the slowest cell. All cells
have the same budget, but those of larger canvases, which have their own.

A first recipe (canvases of 16x16, 800 steps) was given up when half of its tables had been run: it
ended before tables without an absolute embedding had been learned (accuracies of 28 to 46 %, where
rope-axial had 79 and all that have an absolute embedding 71 to 74). k, qkv, absolute + k, absolute
+ qkv and rope-axial had been looked at with seed 1000 when this one was fixed. How much the length
of training decides has a table of its own: ``budget``.
"""

import time
from typing import Any

import torch
import torch.nn.functional as F
from ablation_tables import Cell
from canvases import SIDE, Data, canvases, resized, widened
from measure import machine
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay
from torch import nn

import irpe
from training.data.digits import CLASSES
from training.seeding import derive

RECIPE: dict[str, Any] = {
    "steps": 1600, "batch": 32, "lr": 2e-3, "betas": [0.9, 0.98], "weight_decay": 0.05,
    "warmup": 0.1, "clip": 1.0, "dim": 64, "depth": 2, "heads": 4, "patch": 2, "tests": 1000,
    # Of cells whose canvases are larger, which take four times as long and more.
    "large_steps": 640, "large_batch": 16,
}  # fmt: skip
QUICK = {**RECIPE, "steps": 44, "batch": 8, "large_steps": 20, "large_batch": 4, "tests": 50}
# Sides of canvases in pixels, and rectangles, that models are tested at beside SIDE.
SIDES = (6, 8, 16, 18, 24)
RECTANGLES = ((12, 18), (18, 12), (12, 24))


def build(cell: Cell, seed: int, recipe: dict[str, Any] = RECIPE) -> nn.Module:
    """timm's VisionTransformer, equipped; of one seed, all have the same first weights."""
    torch.manual_seed(derive(seed, "weights"))
    model = VisionTransformer(
        img_size=SIDE * cell.scale, patch_size=recipe["patch"], in_chans=1, num_classes=CLASSES,
        embed_dim=recipe["dim"], depth=recipe["depth"], num_heads=recipe["heads"], mlp_ratio=2.0,
        class_token=False, global_pool="avg", weight_init="jax", dynamic_img_size=True,
    )  # fmt: skip
    if not cell.absolute:  # removed when all weights are drawn, so that the others stay as they are
        model.pos_embed = None
    if cell.encoding is not None:
        irpe.attach(model, cell.encoding)
    return model


def train(model: nn.Module, data: Data, batch: int, recipe: dict[str, Any]) -> None:
    """AdamW, one cycle, every canvas once."""
    groups = param_groups_weight_decay(model, recipe["weight_decay"], model.no_weight_decay())
    optimizer = torch.optim.AdamW(groups, recipe["lr"], betas=tuple(recipe["betas"]))
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe["lr"], len(data[0]) // batch, pct_start=recipe["warmup"]
    )
    model.train()
    for images, classes in zip(data[0].split(batch), data[1].split(batch), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(model(images), classes).backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe["clip"])
        optimizer.step()
        cycle.step()


@torch.inference_mode()
def test(model: nn.Module, data: Data) -> tuple[float, float]:
    """Accuracy in percent, and cross entropy."""
    model.eval()
    logits = torch.cat([model(images) for images in data[0].split(100)])
    right = int((logits.argmax(1) == data[1]).sum())
    return 100 * right / len(logits), float(F.cross_entropy(logits, data[1]))


def execute(cell: Cell, seed: int, recipe: dict[str, Any]) -> dict[str, Any]:
    """Train and test one model on one thread; its line of figures."""
    torch.set_num_threads(1)
    start, cpu = time.perf_counter(), time.process_time()
    size = "large_" if cell.scale > 1 else ""
    steps, batch = int(cell.budget * recipe[f"{size}steps"]), recipe[f"{size}batch"]
    training = canvases("train", steps * batch, seed, cell.scale)
    images, classes = canvases("validation", recipe["tests"], seed, cell.scale)
    model = build(cell, seed, recipe)
    train(model, training, batch, recipe)
    right, loss = test(model, (images, classes))
    line: dict[str, Any] = {
        "key": f"{cell.key} | seed {seed}", "cell": cell.key, "seed": seed,
        "accuracy": right, "loss": loss,
    }  # fmt: skip
    if cell.sizes:
        tests = {f"{side}x{side}": resized(images, side) for side in SIDES}
        tests |= {f"{h}x{w}": widened(images, h, w, seed) for h, w in RECTANGLES}
        line["sizes"] = {name: test(model, (x, classes))[0] for name, x in tests.items()}
    line["seconds"] = round(time.perf_counter() - start, 1)
    line["cpu_seconds"] = round(time.process_time() - cpu, 1)
    return {**line, "recipe": recipe, "machine": machine()}


def accuracies(rows: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, list[float]]]:
    """Of lines tested at several sizes: by size and row, that of training too, squares first."""
    found: dict[str, dict[str, list[float]]] = {}
    for row, lines in rows.items():
        for line in lines:
            for size, accuracy in {f"{SIDE}x{SIDE}": line["accuracy"], **line["sizes"]}.items():
                found.setdefault(size, {}).setdefault(row, []).append(accuracy)

    def order(size: str) -> tuple[bool, int, int]:
        height, width = map(int, size.split("x"))
        return height != width, height * width, height

    return {size: found[size] for size in sorted(found, key=order)}
