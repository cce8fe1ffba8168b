"""COCO files: what is read, and from where."""

import copy
import json
import multiprocessing
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from box_cases import coco as indexed
from coco_files import CATEGORIES, box, entry, instances, write_set, zip_folder
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from training.data.coco import open_coco
from training.data.instances import read_instances

# --- what is read --------------------------------------------------------------------------------


def test_reads_images_in_ascending_order_with_their_annotations(tmp_path: Path):
    folder, file = write_set(tmp_path)
    source = open_coco(folder, file)
    assert source.image_ids == [10, 20, 30]
    assert len(source) == 3
    assert source.image_id(1) == 20
    assert source.name(1) == str(tmp_path / "images" / "20.png")
    assert source.categories == {1: "ant", 3: "bee", 90: "cow"}
    image, found = source.read(0)
    assert (image.mode, image.size, found.image_id) == ("RGB", (20, 16), 10)
    assert found.boxes.tolist() == [[2, 3, 5, 7], [1.25, 2.5, 3.75, 4.5]]
    assert found.category_ids.tolist() == [3, 90]
    assert found.area.tolist() == [30.5, 30.5]
    image, found = source.read(1)
    assert image.size == (12, 24)
    assert found.boxes.shape == (0, 4)
    assert [found.boxes.dtype, found.category_ids.dtype, found.iscrowd.dtype] == [
        torch.float32, torch.int64, torch.bool,
    ]  # fmt: skip
    assert source.read(2)[1].iscrowd.tolist() == [False, True]
    assert source.left_out == []


def test_boxes_partly_outside_are_clipped_for_training(tmp_path: Path):
    data = instances()
    data["annotations"] += [box(5, 20, (-2, 20, 6, 9)), box(6, 20, (11.5, -1, 4, 30))]
    source = open_coco(*write_set(tmp_path, data))
    assert source.read(1)[1].boxes.tolist() == [[0, 20, 4, 4], [11.5, 0, 0.5, 24]]
    truth = indexed(source.ground_truth())
    assert [ann["bbox"] for ann in truth.loadAnns(truth.getAnnIds(imgIds=[20]))] == [
        [-2, 20, 6, 9],
        [11.5, -1, 4, 30],
    ]


def test_entries_are_kept_in_order_for_many_images(tmp_path: Path):
    """Against plain loops, on a file whose annotations come in no order."""
    rng = np.random.default_rng(1)
    images = [entry(int(number), 50, 40) for number in rng.permutation(60)]
    annotations = [
        box(count + 1, int(rng.integers(60)), (1 + count / 64, 2, 3, 4), int(rng.choice([1, 90])))
        for count in range(300)
    ]
    file = tmp_path / "instances.json"
    file.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES})
    )
    found = read_instances(str(file)).only(np.arange(60) % 3 > 0)
    rows = []
    for number in range(60):
        for ann in annotations if number % 3 else ():
            if ann["image_id"] == number:
                rows.append((number, ann["category_id"], ann["bbox"]))
    assert found.image_ids[found.image].tolist() == [number for number, _, _ in rows]
    assert found.category_ids.tolist() == [category for _, category, _ in rows]
    assert found.boxes.tolist() == [bbox for _, _, bbox in rows]


# --- ground truth --------------------------------------------------------------------------------


def twelve(truth: COCO, results: list[dict]) -> list[float]:
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    return evaluation.stats.tolist()


def test_ground_truth_gives_the_numbers_of_the_file(tmp_path: Path, capsys):
    rng = np.random.default_rng(0)
    data = instances()
    data["images"] = [entry(number, 200, 150) for number in (7, 3, 5, 9)]
    # Annotation 1 must not become 0: pycocotools takes that for no match.
    data["annotations"] = [
        box(
            number,
            int(rng.choice([3, 5, 7])),
            (*rng.uniform(0, 80, 2).tolist(), *rng.uniform(5, 110, 2).tolist()),
            int(rng.choice([1, 3])),
            area=float(rng.uniform(10, 12000)),
            iscrowd=int(number % 7 == 0),
        )
        for number in range(1, 40)
    ]
    results = [
        {
            "image_id": ann["image_id"],
            "category_id": ann["category_id"],
            "bbox": (np.array(ann["bbox"]) + rng.uniform(-6, 6, 4)).tolist(),
            "score": float(rng.uniform()),
        }
        for ann in data["annotations"] * 2
    ]
    folder, file = write_set(tmp_path, data)
    source = open_coco(folder, file)
    capsys.readouterr()
    truth = indexed(source.ground_truth())
    assert capsys.readouterr() == ("", "")
    ours, plain = twelve(truth, copy.deepcopy(results)), twelve(COCO(file), results)
    assert 0.05 < plain[0] < 0.95
    assert ours == plain
    assert sorted(truth.getImgIds()) == [3, 5, 7, 9]
    assert truth.cats[90]["name"] == "cow"


def test_missing_area_and_annotation_number_0_do_not_change_matches(tmp_path: Path):
    data = instances()
    for number, ann in enumerate(data["annotations"]):
        ann["id"] = number
        del ann["area"]
    source = open_coco(*write_set(tmp_path, data))
    results = [
        {"image_id": ann["image_id"], "category_id": ann["category_id"], "bbox": ann["bbox"]}
        for ann in data["annotations"]
    ]
    stats = twelve(indexed(source.ground_truth()), [{**one, "score": 0.9} for one in results])
    assert stats[0] == pytest.approx(1.0)
    assert source.read(0)[1].area.tolist() == [35, 3.75 * 4.5]


# --- archives ------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", ["", "train2017/", "deep/train2017/"])
def test_archive_equals_folder(tmp_path: Path, top: str):
    folder, file = write_set(tmp_path)
    archive = zip_folder(folder, tmp_path / "images.zip", top)
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as more:
        more.write(file, "annotations/instances_train2017.json")
    images = archive if top.count("/") < 2 else archive + "/deep/train2017"
    source = open_coco(images, str(tmp_path / "more.zip/annotations/instances_train2017.json"))
    plain = open_coco(folder, file)
    assert source.image_ids == plain.image_ids
    assert source.name(0) == os.path.join(archive, top, "10.png")
    for index in range(3):
        (image, found), (other, expected) = source.read(index), plain.read(index)
        assert image.tobytes() == other.tobytes()
        assert torch.equal(found.boxes, expected.boxes)


def test_file_names_may_have_folders_in_an_archive_and_out_of_it(tmp_path: Path):
    data = instances()
    folder, file = write_set(tmp_path, data)
    archive = zip_folder(folder, tmp_path / "images.zip", "images/")
    for image in data["images"]:
        image["file_name"] = f"images/{image['file_name']}"
    Path(file).write_text(json.dumps(data))
    for images in (str(tmp_path), archive):
        assert open_coco(images, file).read(0)[0].size == (20, 16)


def test_archive_is_opened_by_each_process_for_itself(tmp_path: Path):
    folder, file = write_set(tmp_path)
    source = open_coco(zip_folder(folder, tmp_path / "images.zip"), file)
    expected = source.read(0)[0].tobytes()
    copied = pickle.loads(pickle.dumps(source))
    assert copied.files._open is None
    assert copied.read(0)[0].tobytes() == expected

    def child(pipe) -> None:
        found = source.read(0)[0].tobytes()
        pipe.send((os.getpid(), source.files._open[0], found))

    ours, theirs = multiprocessing.Pipe()
    # Forked, so that the child inherits the open archive.
    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    process.join()
    assert ours.recv() == (process.pid, process.pid, expected)
    assert source.files._open[0] == os.getpid()
