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
from ablation_tables import TABLES, Cell, Study
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


HEAD = """# Image encodings on a small task

**Task.** A handwritten digit (scikit-learn's scans), enlarged to 10 to 12 pixels, lies
anywhere on a canvas of 12x12 pixels, over a piece of 3x3 pixels of another digit. The model names
the digit. Test canvases show digits that training never shows.

**Model and training.** timm's ViT with {depth} blocks of width {dim}, {heads} heads, patches of
{patch} pixels and no class token; {steps} steps of {batch} canvases (for canvases twice as large
{large_steps} steps of {large_batch}), AdamW, learning rate {lr:g}; {tests} test canvases. Learning
rate, batch size, width and depth were tuned on the plain model alone, with seeds 1000 and 1001, and
are the same for all rows. The number of steps is what the slowest row trains in 40 seconds on one
core. No model is trained to the end: see *Length of training*, and `benchmarks/ablation_runs.py`
for a shorter recipe that we gave up.

**Rows.** *absolute only* is the plain model: a learned absolute position embedding and no relative
encoding. *none* has neither. `q`, `k`, `v` and combinations of them say where the relative tables
act; such a row has no absolute embedding unless its name or the text above the table says so.
*bias* and *ctx* are the modes, *euc*, *quant*, *cross* and *product* the methods of the paper:
[encodings](../encodings.md) has their formulas.

**Numbers.** Accuracy in percent: mean over seeds ± half of its 95 % interval (Student). Differences
are taken seed by seed: models of one seed share first weights and all canvases. A difference is
*claimed* if its interval excludes 0, and a *tie* otherwise. Of twenty differences that do not
exist, one is claimed by chance. The column *paper* holds the top-1 accuracy of DeiT-S on ImageNet
(Wu et al., ICCV 2021)."""


def build(cell: Cell, seed: int, recipe: dict[str, Any] = RECIPE) -> nn.Module:
    """Return timm's VisionTransformer with the cell's encoding; weights depend on the seed only."""
    torch.manual_seed(derive(seed, "weights"))
    model = VisionTransformer(
        img_size=SIDE * cell.scale, patch_size=recipe["patch"], in_chans=1, num_classes=CLASSES,
        embed_dim=recipe["dim"], depth=recipe["depth"], num_heads=recipe["heads"], mlp_ratio=2.0,
        class_token=False, global_pool="avg", weight_init="jax", dynamic_img_size=True,
    )  # fmt: skip
    if cell.std is not None:
        nn.init.normal_(model.pos_embed, std=cell.std)
    if not cell.absolute:  # removed after all weights are drawn, so that the others do not change
        model.pos_embed = None
    if cell.encoding is not None:
        irpe.attach(model, cell.encoding)
    return model


def train(model: nn.Module, data: Data, batch: int, recipe: dict[str, Any]) -> None:
    """Train with AdamW and one cycle, every canvas once."""
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
    """Return accuracy in percent, and cross entropy."""
    model.eval()
    logits = torch.cat([model(images) for images in data[0].split(100)])
    right = int((logits.argmax(1) == data[1]).sum())
    return 100 * right / len(logits), float(F.cross_entropy(logits, data[1]))


def execute(cell: Cell, seed: int, recipe: dict[str, Any]) -> dict[str, Any]:
    """Train and test one model on one thread; return its line of results."""
    torch.set_num_threads(1)
    start, cpu = time.perf_counter(), time.process_time()
    size = "large_" if cell.scale > 1 else ""
    steps, batch = int(cell.budget * recipe[f"{size}steps"]), recipe[f"{size}batch"]
    training = canvases("train", steps * batch, seed, cell.scale)
    images, classes = canvases("validation", recipe["tests"], seed, cell.scale)
    model = build(cell, seed, recipe)
    train(model, training, batch, recipe if cell.lr is None else {**recipe, "lr": cell.lr})
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


IMAGE = Study("image", TABLES, RECIPE, QUICK, execute, HEAD, SIDE)
