"""COCO's numbers: against loops, against pycocotools on files of our own, over processes."""

import contextlib
import copy
import io
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from box_cases import CATEGORIES, made, tensors
from oracles import average_precision as oracle
from processes import launch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from training.det.average_precision import NAMES, BoxEvaluation
from training.errors import UserError


def evaluated(dataset, found, order=None):
    """An evaluation that was given ``found``, image by image."""
    evaluation = BoxEvaluation(dataset)
    for image in order or found:
        evaluation.update([image], [tensors(found[image])])
    return evaluation


def pycocotools(truth: Path, results: Path) -> dict[str, float]:
    """What a user of pycocotools gets from two files, -1 as nan."""
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO(str(truth))
        evaluation = COCOeval(ground_truth, ground_truth.loadRes(str(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {
        name: math.nan if value == -1 else float(value)
        for name, value in zip(NAMES, evaluation.stats, strict=True)
    }


def same(a: dict[str, float], b: dict[str, float], tolerance: float = 0.0) -> bool:
    return list(a) == list(b) and np.allclose(
        list(a.values()), list(b.values()), rtol=0, atol=tolerance, equal_nan=True
    )


@pytest.mark.parametrize("seed", range(8))
def test_twelve_numbers_are_those_of_loops(seed):
    dataset, found = made(seed)
    objects = [
        (a["image_id"], a["category_id"], a["bbox"], a["area"], a["iscrowd"])
        for a in dataset["annotations"]
    ]
    flat = [(i, c, box, score) for i, parts in found.items() for c, box, score in parts]
    evaluation = evaluated(dataset, found)
    numbers = evaluation.summarize()
    assert tuple(numbers) == NAMES
    assert same(numbers, oracle.twelve(objects, flat, CATEGORIES), 1e-12)
    assert 0 < numbers["AP"] < numbers["AP50"] < 1
    curves = evaluation.curves()
    assert curves["recall"] == pytest.approx(oracle.RECALLS)
    for name, overlaps in (("AP50", [0.5]), ("AP75", [0.75]), ("AP", oracle.OVERLAPS)):
        wanted = [
            oracle.precisions(*([x for x in xs if x[1] == c] for xs in (objects, flat)), t)
            for c in CATEGORIES[:2]
            for t in overlaps
        ]
        wanted = np.mean([precision for precision, _ in wanted], axis=0)
        assert curves[name] == pytest.approx(wanted.tolist())
        assert np.mean(curves[name]) == pytest.approx(numbers[name])


def test_a_case_for_pencil_and_paper():
    dataset, _ = made(0, images=1)
    # pycocotools by itself counts an object of id 0 as missed.
    dataset["annotations"] = [{"id": 0, "image_id": 10, "category_id": 1, "bbox": [5, 5, 10, 10]}]
    # Inside the object and 62 % of it: right at the thresholds 0.50, 0.55 and 0.60 of ten.
    inside = (1, (5.0, 5.0, 10.0, 6.2), 0.5)
    numbers = evaluated(dataset, {10: [inside]}).summarize()
    wanted = {"AP": 0.3, "AP50": 1.0, "AP75": 0.0, "APs": 0.3, "AR1": 0.3, "AR100": 0.3, "ARs": 0.3}
    assert {name: numbers[name] for name in wanted} == pytest.approx(wanted)
    assert all(math.isnan(numbers[name]) for name in ("APm", "APl", "ARm", "ARl"))
    # A wrong one that is surer halves the precision, and is the only one that AR1 looks at.
    elsewhere = (1, (90.0, 90.0, 10.0, 10.0), 0.75)
    numbers = evaluated(dataset, {10: [inside, elsewhere]}).summarize()
    wanted = {"AP": 0.15, "AP50": 0.5, "AR1": 0.0, "AR10": 0.3}
    assert {name: numbers[name] for name in wanted} == pytest.approx(wanted)


def test_our_file_and_one_written_by_hand_are_the_same_to_pycocotools(tmp_path: Path):
    dataset, found = made(3)
    (tmp_path / "truth.json").write_text(json.dumps(dataset))
    by_hand = [
        {"score": score, "bbox": list(box), "category_id": category, "image_id": image}
        for image, parts in found.items()
        for category, box, score in parts
    ]
    (tmp_path / "hand.json").write_text(json.dumps(by_hand))
    evaluation = evaluated(dataset, found)
    (tmp_path / "ours.json").write_text(json.dumps(evaluation.results()))
    ours, hand = (
        pycocotools(tmp_path / "truth.json", tmp_path / f) for f in ("ours.json", "hand.json")
    )
    assert same(ours, hand) and same(evaluation.summarize(), hand)
    assert 0 < hand["AP"] < 1


@pytest.mark.full
def test_two_processes_give_the_numbers_of_one(tmp_path: Path):
    for processes in (1, 2):
        outputs = launch(processes, Path(__file__).with_name("box_cases.py"), "5", str(tmp_path))
        assert not any("Average Precision" in output for output in outputs)
    one, *two = (
        json.loads((tmp_path / f).read_text()) for f in ("0of1.json", "0of2.json", "1of2.json")
    )
    dataset, found = made(5)
    evaluation = evaluated(dataset, found)
    for shown in (one, *two):
        assert same(shown["numbers"], evaluation.summarize())
        assert shown["precision"] == evaluation.curves()
    for name in ("of1.json", "of2.json"):
        assert json.loads((tmp_path / name).read_text()) == evaluation.results()


def test_order_does_not_matter():
    dataset, found = made(2)
    wanted = evaluated(dataset, found)
    draw = random.Random(0)
    shuffled = {image: draw.sample(parts, len(parts)) for image, parts in found.items()}
    order = draw.sample(sorted(found), len(found))
    other = evaluated(dataset, shuffled, order)
    assert same(other.summarize(), wanted.summarize())
    assert [r["image_id"] for r in other.results()] == [r["image_id"] for r in wanted.results()]


@pytest.mark.parametrize("given", [True, False], ids=["no boxes", "no images"])
def test_no_detections_at_all_are_zeros(given):
    dataset, found = made(1)
    nothing = {image: [] for image in found} if given else {}
    evaluation = evaluated(dataset, nothing)
    assert set(evaluation.summarize().values()) == {0.0}
    assert set(evaluation.curves()["AP"]) == {0.0}
    assert evaluation.results() == []


def test_without_objects_nothing_is_defined():
    dataset, found = made(1)
    dataset["annotations"] = []
    for given in ({}, found):
        evaluation = evaluated(dataset, given)
        assert all(math.isnan(value) for value in evaluation.summarize().values())
        assert all(math.isnan(value) for value in evaluation.curves()["AP"])


def test_skipped_images_do_not_count():
    dataset, found = made(4)
    skipped = sorted(found)[2:4]
    evaluation = BoxEvaluation(dataset)
    evaluation.skip(skipped)
    given = [image for image in found if image not in skipped]
    evaluation.update(given, [tensors(found[image]) for image in given])
    left = {**dataset, "images": [i for i in dataset["images"] if i["id"] in given]}
    left["annotations"] = [a for a in dataset["annotations"] if a["image_id"] in given]
    wanted = evaluated(left, {image: found[image] for image in given})
    assert same(evaluation.summarize(), wanted.summarize())
    assert not same(evaluation.summarize(), evaluated(dataset, found).summarize())


def test_the_first_of_two_counts():
    dataset, found = made(4)
    evaluation = evaluated(dataset, found, [*found, *found])
    image = next(i for i in found if found[i])
    evaluation.update([image], [tensors([])])
    assert evaluation.results() == evaluated(dataset, found).results()


def test_the_ground_truth_stays_as_it_is():
    dataset, found = made(6)
    for annotation in dataset["annotations"]:
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    bare = copy.deepcopy(dataset)
    for annotation in bare["annotations"]:
        del annotation["area"]
        if not annotation["iscrowd"]:
            del annotation["iscrowd"]
    before = copy.deepcopy((dataset, bare))
    assert same(*(evaluated(d, found).summarize() for d in (dataset, bare)))
    assert (dataset, bare) == before


@pytest.mark.parametrize("key", ["scores", "boxes"])
def test_what_is_not_finite_is_refused(key):
    dataset, found = made(1)
    image = next(i for i in found if found[i])
    broken = tensors(found[image])
    broken[key][0] = float("nan")
    with pytest.raises(UserError, match=f"image {image}: detections are not finite"):
        BoxEvaluation(dataset).update([image], [broken])


def test_images_of_another_set_are_refused_and_so_is_what_comes_late():
    dataset, found = made(1)
    evaluation = BoxEvaluation(dataset)
    for add in (evaluation.skip, lambda ids: evaluation.update(ids, [tensors([])])):
        with pytest.raises(UserError, match=r"image id 99 .* has 10, 11"):
            add([99])
    evaluation.summarize()
    with pytest.raises(RuntimeError, match="finished"):
        evaluation.update([10], [tensors([])])


def test_half_precision_and_gradients():
    dataset, found = made(1)
    image = next(i for i in found if found[i])
    given = tensors(found[image])
    half = {**given, "boxes": given["boxes"].half(), "scores": given["scores"].bfloat16()}
    half["boxes"].requires_grad_()
    evaluation = BoxEvaluation(dataset)
    evaluation.update(torch.tensor([image]), [half])
    first = evaluation.results()[0]
    assert first["score"] == half["scores"][0].item()
    assert json.loads(json.dumps(first)) == first
