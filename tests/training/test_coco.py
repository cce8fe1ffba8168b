"""COCO files: what is read, from where, and what becomes of entries that cannot be used."""

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
from coco_files import CATEGORIES, box, entry, instances, write_set, zip_folder
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from training.data.coco import open_coco
from training.data.instances import read_instances
from training.data.pixels import decode_rgb
from training.errors import UserError

# --- what is read --------------------------------------------------------------------------------


def test_reads_images_in_ascending_order_with_their_annotations(tmp_path: Path):
    folder, file = write_set(tmp_path)
    source = open_coco(folder, file)
    assert source.image_ids == [10, 20, 30]
    assert len(source) == 3
    assert source.image_id(1) == 20
    assert source.name(1) == str(tmp_path / "images" / "20.png")
    assert source.categories == {1: "ant", 3: "bee", 90: "cow"}
    assert source.num_classes == 91
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
    assert (source.report.skipped, source.report.clipped, source.report.without_boxes) == ([], 0, 1)


def test_boxes_partly_outside_are_clipped_for_training_and_counted(tmp_path: Path):
    data = instances()
    data["annotations"] += [box(5, 20, (-2, 20, 6, 9)), box(6, 20, (11.5, -1, 4, 30))]
    source = open_coco(*write_set(tmp_path, data))
    assert source.read(1)[1].boxes.tolist() == [[0, 20, 4, 4], [11.5, 0, 0.5, 24]]
    assert source.report.clipped == 2
    truth = source.coco_ground_truth()
    assert [ann["bbox"] for ann in truth.loadAnns(truth.getAnnIds(imgIds=[20]))] == [
        [-2, 20, 6, 9],
        [11.5, -1, 4, 30],
    ]


def test_images_without_boxes_are_left_out_only_if_wanted(tmp_path: Path):
    data = instances()
    data["images"].append(entry(40))
    data["annotations"].append(box(5, 40, iscrowd=1))
    folder, file = write_set(tmp_path, data)
    source = open_coco(folder, file)
    assert source.image_ids == [10, 20, 30, 40]
    assert source.report.without_boxes == 2
    fewer = open_coco(folder, file, keep_without_boxes=False)
    assert fewer.image_ids == [10, 30]
    for index in (0, 1):
        ours, other = fewer.read(index), source.read(2 * index)
        assert torch.equal(ours[1].boxes, other[1].boxes)
        assert ours[0].tobytes() == other[0].tobytes()
    data["annotations"] = [box(5, 40, iscrowd=1)]
    with pytest.raises(UserError, match="has a box to learn"):
        open_coco(*write_set(tmp_path, data), keep_without_boxes=False)


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
    truth = source.coco_ground_truth()
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
    stats = twelve(source.coco_ground_truth(), [{**one, "score": 0.9} for one in results])
    assert stats[0] == pytest.approx(1.0)
    assert source.read(0)[1].area.tolist() == [35, 3.75 * 4.5]


# --- files that are no instances files -----------------------------------------------------------

NO_INSTANCES = [
    (b"{", ["is not JSON"]),
    (b"\xff\xfe\x00", ["is not JSON"]),
    (b"[" * 100_000, ["is not JSON"]),
    (b"[]", ["holds a list", "an instances file has"]),
    (b"{}", ["no list 'images' but nothing"]),
    ({"categories": None}, ["no list 'categories'", "annotations, images"]),
    ({"annotations": {}}, ["no list 'annotations'"]),
    ({"categories": []}, ["has no categories"]),
    ({"images": []}, ["has no images"]),
    ({"annotations": [{"id": 1, "image_id": 10, "caption": "ants"}]}, ["no annotation has a bbox"]),
    ({"categories": [{"name": "ant"}]}, ["{'name': 'ant'}", "whole number"]),
    ({"categories": [{"id": -1}]}, ["{'id': -1}", "0 or more"]),
    ({"categories": ["ant"]}, ["'ant'", "whole number"]),
    ({"categories": [{"id": 3}, {"id": 3}]}, ["two categories with id 3"]),
    ({"images": [{"id": "a", "file_name": "a.png"}]}, ["no image", "can be used", "whole number"]),
]


@pytest.mark.parametrize(("content", "parts"), NO_INSTANCES)
def test_not_an_instances_file(tmp_path: Path, content, parts: list[str]):
    folder, file = write_set(tmp_path)
    if isinstance(content, dict):
        data = {**instances(), **content}
        if content.get("categories", 1) is None:
            del data["categories"]
        content = json.dumps(data).encode()
    Path(file).write_bytes(content)
    with pytest.raises(UserError) as caught:
        open_coco(folder, file)
    assert [part for part in [*parts, file] if part not in str(caught.value)] == []


def test_paths_that_lead_nowhere(tmp_path: Path):
    folder, file = write_set(tmp_path)
    archive = zip_folder(folder, tmp_path / "images.zip")
    (tmp_path / "bad.zip").write_bytes(b"no archive")
    (tmp_path / "empty").mkdir()
    cases = [
        (str(tmp_path / "none"), file, ["images", "none' does not exist"]),
        (file, file, ["images", "is no folder or zip archive"]),
        (str(tmp_path / "bad.zip"), file, ["images", "no readable zip archive", "bad.zip"]),
        (folder, str(tmp_path / "none.json"), ["annotations", "none.json' does not exist"]),
        (folder, folder, ["annotations", "cannot be read"]),
        (folder, str(tmp_path / "bad.zip/instances.json"), ["annotations", "cannot be read"]),
        (folder, archive, ["is an archive; go on to a file in it"]),
        (folder, archive + "/no.json", ["annotations", "no.json", "not in the archive"]),
        (str(tmp_path / "empty"), file, ["has none of the 3 images", "empty/10.png"]),
        (archive + "/elsewhere", file, ["none of the 3 images", "images.zip/elsewhere/10.png"]),
    ]
    for images, annotations, parts in cases:
        with pytest.raises(UserError) as caught:
            open_coco(images, annotations)
        assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)


# --- entries that cannot be used -----------------------------------------------------------------

BAD_ANNOTATIONS = [
    (box(9, 10, (2, 3, 0, 7)), "[2, 3, 0, 7] in image 10 ('10.png') has no area"),
    (box(9, 10, (2, 3, 5, -7)), "has no area"),
    (box(9, 10, (20, 3, 5, 7)), "[20, 3, 5, 7] in image 10 ('10.png') is outside of its 20 x 16"),
    (box(9, 10, (2, 16, 5, 7)), "outside"),
    (box(9, 10, (-5, 3, 5, 7)), "outside"),
    (box(9, 10, (2, -8, 5, 7)), "outside"),
    (box(9, 10, (2, 3, 5)), "[2, 3, 5] in image 10 ('10.png') is not four numbers"),
    (box(9, 10, (2, 3, 5, "7")), "is not four numbers"),
    (box(9, 10, (2, 3, float("nan"), 7)), "is not four numbers"),
    (box(9, 10, (2, 3, float("inf"), 7)), "is not four numbers"),
    (box(9, 10, (2, 3, 10**400, 7)), "is not four numbers"),
    ({**box(9, 10), "bbox": None}, "None in image 10 ('10.png') is not four numbers"),
    (box(9, 10, category=2), "there is no category 2"),
    (box(9, 10, category=[3]), "there is no category [3]"),
    (box(9, 11), "there is no image 11"),
    (box(9, [10]), "there is no image [10]"),
    (box(9, 10, area="big"), "area 'big'"),
    ("ant", "'ant' is no annotation"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_ANNOTATIONS)
def test_bad_annotation_is_skipped_and_named_or_fails(tmp_path: Path, bad, reason: str):
    data = instances()
    data["annotations"].insert(1, bad)
    folder, file = write_set(tmp_path, data)
    source = open_coco(folder, file)
    assert len(source.report.skipped) == 1
    assert reason in source.report.skipped[0]
    label = "9" if isinstance(bad, dict) else "None"
    assert source.report.skipped[0].startswith(f"annotation {label} (number 1 of the list): ")
    # Everything else is there, in training and in the ground truth.
    assert [len(source.read(index)[1].boxes) for index in range(3)] == [2, 0, 2]
    assert len(source.coco_ground_truth().anns) == 4
    with pytest.raises(UserError) as caught:
        open_coco(folder, file, on_bad_annotation="fail")
    assert reason in str(caught.value)
    assert "on_bad_annotation: skip would leave it out" in str(caught.value)


BAD_IMAGES = [
    (entry(10), "image 10 ('10.png', number 3 of the list): '10.png' has the same id"),
    ({**entry(5), "id": "5"}, "image '5' ('5.png', number 3 of the list): its id is not a whole"),
    ({**entry(5), "id": True}, "its id is not a whole number"),
    ({**entry(5), "file_name": None}, "it has no file_name"),
    ({**entry(5), "width": 0}, "its height and width are 16 and 0"),
    ({**entry(5), "height": None}, "its height and width are None and 20"),
    ("ant", "image None (None, number 3 of the list): its id is not a whole number"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_IMAGES)
def test_bad_image_entry_is_skipped_and_named_or_fails(tmp_path: Path, bad, reason: str):
    folder, file = write_set(tmp_path)
    data = instances()
    data["images"].append(bad)
    Path(file).write_text(json.dumps(data))
    source = open_coco(folder, file)
    assert source.image_ids == [10, 20, 30]
    assert len(source.report.skipped) == 1
    assert reason in source.report.skipped[0]
    with pytest.raises(UserError, match="on_bad_annotation"):
        open_coco(folder, file, on_bad_annotation="fail")


def test_failing_says_how_many_more(tmp_path: Path):
    data = instances()
    data["annotations"] += [box(7, 99), box(8, 98), box(9, 97)]
    folder, file = write_set(tmp_path, data)
    with pytest.raises(UserError, match=r"no image 99 \(and 2 more\)"):
        open_coco(folder, file, on_bad_annotation="fail")


@pytest.mark.parametrize("zipped", [False, True])
def test_absent_image_is_skipped_and_named_or_fails(tmp_path: Path, zipped: bool):
    folder, file = write_set(tmp_path)
    os.remove(Path(folder, "10.png"))
    if zipped:
        folder = zip_folder(folder, tmp_path / "images.zip")
    source = open_coco(folder, file)
    assert source.image_ids == [20, 30]
    assert [source.read(index)[1].image_id for index in (0, 1)] == [20, 30]
    assert len(source.read(1)[1].boxes) == 2
    (reason,) = source.report.skipped
    assert f"image 10: no file '{folder}" in reason
    assert "10.png'; 2 annotations go with it" in reason
    truth = source.coco_ground_truth()
    assert (sorted(truth.imgs), len(truth.anns)) == ([20, 30], 2)
    with pytest.raises(UserError, match="10.png.*on_bad_image: skip"):
        open_coco(folder, file, on_bad_image="fail")


def test_image_of_another_size_or_damaged_is_an_error_of_its_file(tmp_path: Path):
    folder, file = write_set(tmp_path)
    Image.new("RGB", (16, 20)).save(Path(folder, "10.png"))
    whole = Path(folder, "20.png").read_bytes()
    Path(folder, "20.png").write_bytes(whole[: len(whole) // 2])
    Path(folder, "30.png").write_bytes(b"no image")
    source = open_coco(folder, file)
    with pytest.raises(ValueError, match=r"16 x 20 pixels, but is annotated as 20 x 16"):
        source.read(0)
    for index in (1, 2):
        with pytest.raises((OSError, SyntaxError)):
            source.read(index)


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


def test_damaged_member_is_an_error_of_its_file(tmp_path: Path):
    folder, file = write_set(tmp_path)
    archive = zip_folder(folder, tmp_path / "images.zip")
    with zipfile.ZipFile(archive) as opened:
        start = opened.getinfo("20.png").header_offset + 60
    content = bytearray(Path(archive).read_bytes())
    content[start] ^= 0xFF
    Path(archive).write_bytes(content)
    source = open_coco(archive, file)
    source.read(0), source.read(2)
    with pytest.raises(OSError, match="damaged"):
        source.read(1)


# --- pixels --------------------------------------------------------------------------------------


def encoded(image: Image.Image, path: Path, **options) -> bytes:
    image.save(path, **options)
    return path.read_bytes()


def pixels_of(content: bytes) -> np.ndarray:
    image = decode_rgb(content)
    assert image.mode == "RGB"
    return np.asarray(image)


def ramp(top: int, dtype) -> np.ndarray:
    return np.linspace(0, top, 35).round().astype(dtype).reshape(5, 7)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bits_are_scaled(tmp_path: Path, name: str):
    values = ramp(65535, np.uint16)
    found = pixels_of(encoded(Image.fromarray(values), tmp_path / name))
    expected = [[int(value / 257 + 0.5) for value in row] for row in values.tolist()]
    assert (found == np.array(expected)[..., None]).all()
    assert (found.min(), found.max()) == (0, 255)


def test_16_bits_that_pil_reads_as_32(tmp_path: Path):
    values = ramp(65535, np.int32)
    found = pixels_of(encoded(Image.fromarray(values), tmp_path / "a.tif"))
    assert (found.min(), found.max()) == (0, 255)
    for bad in (values * 2, values - 1, values.astype(np.float32)):
        with pytest.raises(OSError, match="range is not known"):
            decode_rgb(encoded(Image.fromarray(bad), tmp_path / "a.tif"))


def test_modes(tmp_path: Path):
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
    alpha = rng.integers(0, 256, (6, 5, 1), dtype=np.uint8)
    grey = colour[..., 0]
    image = Image.fromarray(colour)
    twelve_colours = image.quantize(12)
    transparent = twelve_colours.copy()
    transparent.info["transparency"] = bytes(range(0, 120, 10))
    cases = [
        (image, {}, colour),
        (Image.fromarray(grey), {}, np.stack([grey] * 3, -1)),
        (Image.fromarray(grey > 127), {}, np.stack([(grey > 127) * np.uint8(255)] * 3, -1)),
        (Image.fromarray(np.concatenate((colour, alpha), -1)), {}, colour),
        (Image.fromarray(np.stack((grey, alpha[..., 0]), -1)), {}, np.stack([grey] * 3, -1)),
        (twelve_colours, {}, np.asarray(twelve_colours.convert("RGB"))),
        (transparent, {}, np.asarray(twelve_colours.convert("RGB"))),
    ]
    for case, options, expected in cases:
        found = pixels_of(encoded(case, tmp_path / "a.png", **options))
        assert (found == expected).all(), case.mode


def test_cmyk(tmp_path: Path):
    cyan, black = (255, 0, 0, 0), (0, 0, 0, 255)
    image = Image.new("CMYK", (16, 8), cyan)
    image.paste(black, (8, 0, 16, 8))
    for name in ("a.jpg", "a.tif"):
        found = pixels_of(encoded(image, tmp_path / name)).astype(int)
        assert abs(found[:, :8] - (0, 255, 255)).max() <= 6
        assert found[:, 8:].max() <= 6


def test_orientation_is_not_applied(tmp_path: Path):
    image = Image.fromarray(np.arange(8 * 16 * 3, dtype=np.uint8).reshape(8, 16, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(image, tmp_path / "a.jpg", exif=exif, quality=95)
    plain = encoded(image, tmp_path / "b.jpg", quality=95)
    assert Image.open(tmp_path / "a.jpg").getexif()[0x0112] == 6
    assert (pixels_of(turned) == pixels_of(plain)).all()
    assert decode_rgb(turned).size == (16, 8)


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
