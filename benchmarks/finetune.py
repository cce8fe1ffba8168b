"""A trained ViT, fine-tuned with freshly attached tables and without, on handwritten digits.

    python benchmarks/finetune.py

Trains a plain timm ViT on scikit-learn's digits, trains further from its weights in both ways over
the same batches, and writes benchmarks/results/finetune_digits.json and docs/results/finetune.md. A
seed sets the split, the first weights and the order.
"""

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from measure import machine, save, student
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

import irpe

SPEC, DECAY, LR, GENTLE, TABLES = "rpe-1.9-product-ctx-0-k", 0.05, 3e-3, 1e-3, 1e-2
PAGE = Path(__file__).parents[1] / "docs" / "results" / "finetune.md"
TEXT = """# Fine-tuning with freshly attached tables

`python benchmarks/finetune.py --seeds {seeds} --epochs {epochs} --more {more}` writes this page.
A plain timm ViT (8x8 digits, patches of 2, 3 blocks of width 48) trains for {epochs} epochs (row
*as trained*). From its weights it trains {more} epochs more, without tables and with
`{spec}` attached, over the same batches. The learning rate is {lr:g}, that of
the tables {table_lr:g} without weight decay (`irpe.param_groups`). 360 images are held out; a cell
holds the mean over {seeds} seeds and its 95 % interval (Student).
{processor}, {threads} thread, torch {torch}, {date}; `benchmarks/results/finetune_digits.json`.

| | accuracy, % | cross entropy |
|---|---|---|"""
Data = tuple[Tensor, Tensor]
Results = dict[str, tuple[float, float]]


def split(seed: int) -> tuple[Data, Data]:
    """Return training and held-out images ``[N, 1, 8, 8]`` with their classes."""
    pixels, classes = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    x, held_x, y, held_y = train_test_split(
        images, torch.tensor(classes), test_size=0.2, stratify=classes, random_state=seed
    )
    return (x, y), (held_x, held_y)


def train(model: nn.Module, groups: list[dict[str, Any]], data: Data, epochs: int, seed: int):
    """Train with AdamW and one cycle up to each group's learning rate; shift images by a pixel."""
    images, classes = data
    optimizer, peaks = torch.optim.AdamW(groups), [group["lr"] for group in groups]
    steps = epochs * (len(images) // 128)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, steps, pct_start=0.2)
    draw = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=draw).split(128)[: steps // epochs]:
            down, right = torch.randint(0, 3, (2,), generator=draw).tolist()
            x = F.pad(images[batch], [1] * 4, value=-1)[..., down : down + 8, right : right + 8]
            optimizer.zero_grad()
            F.cross_entropy(model(x), classes[batch]).backward()
            optimizer.step()
            cycle.step()


@torch.no_grad()
def measure(model: nn.Module, data: Data) -> tuple[float, float]:
    """Return accuracy in percent, and cross entropy."""
    logits = model.eval()(data[0])
    right = (logits.argmax(1) == data[1]).double().mean()
    return 100 * float(right), float(F.cross_entropy(logits, data[1]))


def run(seed: int, epochs: int, more: int) -> Results:
    """A training, and what becomes of it."""
    training, held_out = split(seed)
    torch.manual_seed(seed)
    plain = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=48,
        depth=3, num_heads=3, class_token=False, global_pool="avg", weight_init="jax",
    )  # fmt: skip

    def groups(lr: float) -> list[dict[str, Any]]:
        return [{"lr": lr, **group} for group in param_groups_weight_decay(plain, DECAY)]

    train(plain, groups(LR), training, epochs, seed)
    figures = {"as trained": measure(plain, held_out)}
    attached = copy.deepcopy(plain)
    train(plain, groups(GENTLE), training, more, seed)
    figures["fine-tuned without tables"] = measure(plain, held_out)
    irpe.attach(attached, SPEC)
    tables = {"table_lr": TABLES, "table_weight_decay": 0.0}
    own = irpe.param_groups(attached, weight_decay=DECAY, lr=GENTLE, **tables)
    train(attached, own, training, more, seed)
    figures["fine-tuned with tables"] = measure(attached, held_out)
    return figures


def spread(values: list[float], form: str) -> tuple[str, bool]:
    """Mean and 95 % interval of the mean (Student), and whether that holds 0."""
    mean, half = student(values)
    return f"{mean:{form}} ± {half:{form.removeprefix('+')}}", abs(mean) <= half


def page(runs: list[Results], given: dict[str, int], facts: dict[str, Any]) -> str:
    """Return the page; ``given`` holds the numbers of seeds, epochs and more epochs."""
    trained, without, tables = runs[0]
    lines = [TEXT.format(**given, **facts, spec=SPEC, lr=GENTLE, table_lr=TABLES)]
    for name in (trained, without, tables):
        cells = [spread([r[name][i] for r in runs], f)[0] for i, f in ((0, ".2f"), (1, ".4f"))]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    lines += ["", "With tables minus without, seed by seed (a tie if the interval holds 0):", ""]
    for index, form, what in ((0, "+.2f", "accuracy, points"), (1, "+.4f", "cross entropy")):
        pairs = [r[tables][index] - r[without][index] for r in runs]
        text, tie = spread(pairs, form)
        better = (statistics.mean(pairs) > 0) == (index == 0)
        verdict = "a tie" if tie else f"{'better' if better else 'worse'} with tables"
        lines.append(f"- {what}: {text}, {verdict}")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="seeds from 0 on, at least 3")
    parser.add_argument("--epochs", type=int, default=60, help="of the plain training")
    parser.add_argument("--more", type=int, default=20, help="epochs of fine-tuning")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--name", default="finetune_digits", help="of the result file")
    given = parser.parse_args()
    if given.seeds < 3 or given.epochs < 1 or given.more < 1:
        parser.error("--seeds is at least 3, --epochs and --more at least 1")
    torch.set_num_threads(1)
    runs = []
    for seed in range(given.seeds):
        runs.append(run(seed, given.epochs, given.more))
        print(seed, {name: f"{a:.2f} % {b:.4f}" for name, (a, b) in runs[-1].items()}, flush=True)
    numbers = {name: getattr(given, name) for name in ("seeds", "epochs", "more")}
    facts = machine()
    save(given.name, {"machine": facts, "given": numbers, "runs": runs})
    given.page.parent.mkdir(parents=True, exist_ok=True)
    given.page.write_text(page(runs, numbers, facts), encoding="utf-8")
    print(given.page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
