"""Fine-tune by the documented commands on real images: docs/results/finetune_commands.md.

    python benchmarks/finetune_commands.py --work runs/finetune

Writes images of Fashion-MNIST into folders (and onto canvases, in COCO's format), trains plain
models, and starts from their weights: on other classes, with an encoding, at another image size,
and with a detector on other categories. Each fine-tuned model is compared with a fresh one after
one epoch of the same command. The data is Debian's package dataset-fashion-mnist, or the four IDX
files in a folder given by --data.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from measure import machine, save
from PIL import Image

from training.data.fashion import DEBIAN, NAMES, Fashion

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results" / "finetune_commands.md"
CLS = "train_cls.py --config configs/cls/digits.yaml --data.name folder --model.img_size 28"
DET = "train_det.py --config configs/det/digits.yaml --data.name coco"
SPEC = "rpe-1.9-product-ctx-1-k"
HEAD = """# Fine-tuning by command

`python benchmarks/finetune_commands.py` writes this page. A plain model trains on images of
Fashion-MNIST in folders (column *from*). One epoch follows on other data or with other options
(column *to*), once from the trained weights and once from fresh ones, by the same command.
{processor}, torch {torch}, {date}; `benchmarks/results/finetune_commands.json`.

| from | to | command adds | held-out {number}, from weights | fresh |
|---|---|---|---|---|
"""


def read(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 28, 28] and classes [N] of a part, train or test."""
    split = "test" if part == "test" else "train+validation"
    source = Fashion(split, root=None if folder == DEBIAN else str(folder))
    return source.pixels, source.targets


def write_folders(data: Path, out: Path, classes: list[int], count: int, first: int) -> None:
    """``count`` training images of each class, and a third as many held out, a folder a class."""
    for part, split, most in (("train", "train", count), ("test", "val", count // 3)):
        images, labels = read(data, part)
        for number in classes:
            own = out / split / NAMES[number]
            own.mkdir(parents=True, exist_ok=True)
            for i in np.flatnonzero(labels == number)[first : first + most]:
                Image.fromarray(images[i]).save(own / f"{i}.png")


def write_scenes(data: Path, out: Path, classes: list[int], counts: dict[str, int]) -> None:
    """Canvases of 64 pixels with one to three items, in COCO's folders and format."""
    draw = np.random.default_rng(0)
    for split, count in counts.items():
        images, labels = read(data, "train" if split == "train" else "test")
        own = {number: np.flatnonzero(labels == number) for number in classes}
        folder = out / f"{split}2017"
        folder.mkdir(parents=True, exist_ok=True)
        entries, boxes = [], []
        for image in range(count):
            canvas = np.zeros((64, 64), np.uint8)
            places = draw.permutation([(y, x) for y in (2, 34) for x in (2, 34)])
            for y, x in places[: draw.integers(1, 4)]:
                number = int(draw.choice(classes))
                item = images[draw.choice(own[number])]
                canvas[y : y + 28, x : x + 28] = item
                rows, columns = (np.flatnonzero(item.max(axis) > 20) for axis in (1, 0))
                box = [int(x + columns[0]), int(y + rows[0]), int(np.ptp(columns)) + 1,
                       int(np.ptp(rows)) + 1]  # fmt: skip
                boxes.append({"id": len(boxes) + 1, "image_id": image, "category_id": number + 1,
                              "bbox": box, "area": box[2] * box[3], "iscrowd": 0})  # fmt: skip
            name = f"{image:05}.png"
            Image.fromarray(canvas).convert("RGB").save(folder / name)
            entries.append({"id": image, "file_name": name, "height": 64, "width": 64})
        categories = [{"id": number + 1, "name": NAMES[number]} for number in classes]
        content = {"images": entries, "annotations": boxes, "categories": categories}
        path = out / "annotations" / f"instances_{split}2017.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


def run(work: Path, name: str, command: str, options: str) -> tuple[dict, str]:
    """Run a command unless its run is there; its last record and what it said of the weights."""
    folder, log = work / "runs" / name, work / f"{name}.log"
    if not (folder / "curves.png").exists():
        line = f"{command} {options} --run.output {work / 'runs'} --run.experiment {name}"
        done = subprocess.run(
            [sys.executable, *line.split()], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"error: {line}\n{done.stdout}{done.stderr}")
        log.write_text(done.stdout)
    records = (folder / "metrics.jsonl").read_text().splitlines()
    said = [line for line in log.read_text().splitlines() if "taken" in line]
    return json.loads(records[-1]), said[0] if said else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of images and runs")
    parser.add_argument("--data", type=Path, default=DEBIAN, help="folder of the IDX files")
    parser.add_argument("--count", type=int, default=300, help="training images of each class")
    parser.add_argument("--epochs", type=int, default=12, help="of the plain models")
    arguments = parser.parse_args()
    work, count = arguments.work.resolve(), arguments.count
    every, few = list(range(10)), [5, 7, 9]
    if not (work / "done").exists():
        write_folders(arguments.data, work / "ten", every, count, 0)
        write_folders(arguments.data, work / "three", few, count, count)
        write_folders(arguments.data, work / "other", every, count, count)
        counts = {"train": 2 * count, "val": count // 3}
        write_scenes(arguments.data, work / "scenes", [0, 1, 2, 3, 4], counts)
        write_scenes(arguments.data, work / "others", [5, 7, 8, 9], counts)
        (work / "done").touch()
    epochs = f"--epochs {arguments.epochs}"
    run(work, "plain", f"{CLS} --rpe null --data.root {work / 'ten'}", epochs)
    run(work, "detr", f"{DET} --enc_rpe2d null --coco_path {work / 'scenes'}", epochs)
    plain, detr = (
        work / "runs" / name / "checkpoints/last.safetensors" for name in ("plain", "detr")
    )
    short = "--epochs 1 --sched.warmup_epochs 0.2 --batch_size 32"
    cases = [
        ("10 classes", "3 others", CLS, f"--data.root {work / 'three'} --rpe null", plain),
        ("plain", "tables", CLS, f"--data.root {work / 'other'} --rpe {SPEC}", plain),
        ("28 pixels", "40 pixels", CLS,
         f"--data.root {work / 'other'} --rpe null --model.img_size 40", plain),
        ("DETR, 5 categories", "4 others, tables", DET,
         f"--coco_path {work / 'others'} --enc_rpe2d {SPEC}", detr),
    ]  # fmt: skip
    rows = []
    for before, after, command, options, weights in cases:
        name = after.replace(" ", "-").replace(",", "")
        tuned, said = run(work, name, command, f"{options} {short} --checkpoint {weights}")
        fresh, _ = run(work, f"{name}-fresh", command, f"{options} {short}")
        told = said.replace(str(weights), "FILE")
        shown = options.replace(f"{work}/", "").replace("--rpe null", "").strip()
        rows.append({"from": before, "to": after, "options": shown, "report": told,
                     "tuned": tuned["loss"], "fresh": fresh["loss"]})  # fmt: skip
        print(f"{before} -> {after}: {tuned['loss']:.3f}, fresh {fresh['loss']:.3f}; {told}")
    figures = {"rows": rows, "machine": machine(), "count": count, "epochs": arguments.epochs}
    save("finetune_commands", figures)
    PAGE.write_text(page(figures))
    print("written to", PAGE)


def page(results: dict) -> str:
    """Return the page of docs/results."""
    text = HEAD.format(number="loss", **results["machine"])
    for row in results["rows"]:
        text += f"| {row['from']} | {row['to']} | `{row['options']} --checkpoint FILE` | "
        text += f"{row['tuned']:.3f} | {row['fresh']:.3f} |\n"
    text += "\nWhat the scripts print about the weights:\n\n"
    return text + "".join(f"- {row['to']}: {row['report']}\n" for row in results["rows"])


if __name__ == "__main__":
    main()
