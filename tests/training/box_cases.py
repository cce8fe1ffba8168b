"""Small detection sets made at random; as a script, one process of their evaluation."""

import contextlib
import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from pycocotools.coco import COCO

CATEGORIES = (1, 3, 4)
Found = dict[int, list[tuple[int, tuple[float, ...], float]]]  # image: category, x y w h, score


def coco(dataset: dict[str, Any]) -> COCO:
    """What ``COCO(file)`` makes of a file with this content."""
    found = COCO()
    found.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        found.createIndex()
    return found


def made(seed: int, images: int = 7) -> tuple[dict[str, Any], Found]:
    """A ground truth with crowds and all sizes, and detections near and far from it.

    Numbers are multiples of 1/4 (scores, all different, of 1/4096), so float32 holds them.
    """
    draw = random.Random(seed)
    scores = draw.sample(range(1, 4096), 600)
    annotations: list[dict[str, Any]] = []
    found: Found = {}
    for image in range(10, 10 + images):
        found[image] = []
        for _ in range(draw.randrange(5)):
            side = draw.choice([12, 20, 50, 80, 120, 200])
            box = [draw.randrange(4 * 200) / 4, draw.randrange(4 * 200) / 4]
            box += [draw.randrange(2 * side, 5 * side) / 4 for _ in range(2)]
            category = draw.choice(CATEGORIES[:2])  # the last one has no objects
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": category,
                    "bbox": box,
                    # A segmentation's area is less than its box's.
                    "area": box[2] * box[3] * draw.choice([1, 0.5]),
                    "iscrowd": int(draw.random() < 0.2),
                }
            )
            for _ in range(draw.randrange(4)):
                near = [x + draw.randrange(-side // 6, side // 6 + 1) / 4 for x in box]
                label = draw.choice((category, category, category, *CATEGORIES, 2))
                found[image].append((label, tuple(near), scores.pop() / 4096))
        for _ in range(draw.randrange(4)):
            far = tuple(draw.randrange(4, 4 * 100) / 4 for _ in range(4))
            found[image].append((draw.choice(CATEGORIES), far, scores.pop() / 4096))
    images_ = [{"id": i, "width": 300, "height": 300} for i in sorted(found, reverse=True)]
    categories = [{"id": i, "name": f"thing {i}"} for i in CATEGORIES]
    return {"images": images_, "categories": categories, "annotations": annotations}, found


def tensors(found: list[tuple[int, tuple[float, ...], float]]) -> dict[str, torch.Tensor]:
    """Detections of one image as ``models.detr.detections`` gives them."""
    corners = [[x, y, x + w, y + h] for _, (x, y, w, h), _ in found]
    return {
        "labels": torch.tensor([label for label, _, _ in found], dtype=torch.int64),
        "scores": torch.tensor([score for _, _, score in found]),
        "boxes": torch.tensor(corners).reshape(-1, 4),
    }


def main(seed: str, path: str) -> None:
    """Evaluate this process's part, images in padding twice, and write what came out."""
    from accelerate import Accelerator

    from training.det.average_precision import BoxEvaluation

    accelerator = Accelerator(cpu=True)
    rank, world = accelerator.process_index, accelerator.num_processes
    dataset, found = made(int(seed))
    evaluation = BoxEvaluation(dataset, accelerator)
    ids = sorted(found)
    evaluation.update(ids[rank::world], [tensors(found[i]) for i in ids[rank::world]])
    if len(ids[rank::world]) < len(ids[::world]):
        # As samplers do, but with other boxes, to see which of the two counts.
        evaluation.update(ids[:1], [tensors([(1, (0.0, 0.0, 9.0, 9.0), 1.0)])])
    if rank == world - 1:
        evaluation.skip(ids[-1:])  # another process has it: an image that was given counts
    curves = evaluation.curves()
    if rank == 0:
        (Path(path) / f"of{world}.json").write_text(json.dumps(evaluation.results()))
    shown = {"numbers": evaluation.summarize(), "precision": curves}
    (Path(path) / f"{rank}of{world}.json").write_text(json.dumps(shown))
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
