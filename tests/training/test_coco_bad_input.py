"""COCO files that cannot be used, or not whole: one clear error, or a named skip."""

import json
import os
import zipfile
from functools import partial
from pathlib import Path

import pytest
from box_cases import coco as indexed
from coco_files import box, entry, instances, write_set, zip_folder
from common import refuses
from PIL import Image

from training.data.coco import open_coco
from training.errors import UserError

# --- files that are no instances files -----------------------------------------------------------

NO_INSTANCES = [
    (b"{", ["is not JSON"]),
    (b"\xff\xfe\x00", ["is not JSON"]),
    (b"[" * 100_000, ["is not JSON"]),
    (b"[]", ["contains a list", "an instances file has"]),
    (b"{}", ["no list 'images' but nothing"]),
    ({"categories": None}, ["no list 'categories'", "annotations, images"]),
    ({"annotations": {}}, ["no list 'annotations'"]),
    ({"categories": []}, ["has no categories"]),
    ({"images": []}, ["has no images"]),
    ({"annotations": [{"id": 1, "image_id": 10, "caption": "ants"}]}, ["no annotation has a bbox"]),
    ({"categories": [{"name": "ant"}]}, ["{'name': 'ant'}", "whole number"]),
    ({"categories": [{"id": -1}]}, ["{'id': -1}", "0 or more"]),
    ({"categories": ["ant"]}, ["'ant'", "whole number"]),
    ({"categories": [{"id": 2_900_000}]}, ["2900000", "2900001", "renumber"]),
    ({"categories": [{"id": 3}, {"id": 3}]}, ["'id': 3", "has the same id"]),
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
    refuses(partial(open_coco, folder, file), *parts, file, error=UserError)


def test_paths_that_lead_nowhere(tmp_path: Path):
    folder, file = write_set(tmp_path)
    archive = zip_folder(folder, tmp_path / "images.zip")
    (tmp_path / "bad.zip").write_bytes(b"no archive")
    (tmp_path / "empty").mkdir()
    cases = [
        (str(tmp_path / "none"), file, ["images", "none' does not exist"]),
        (file, file, ["images", "is not a folder or zip archive"]),
        (str(tmp_path / "bad.zip"), file, ["images", "not a readable zip archive", "bad.zip"]),
        (folder, str(tmp_path / "none.json"), ["annotations", "none.json' does not exist"]),
        (folder, folder, ["annotations", "cannot be read"]),
        (folder, str(tmp_path / "bad.zip/instances.json"), ["annotations", "cannot be read"]),
        (folder, archive, ["is an archive; name a file in it"]),
        (folder, archive + "/no.json", ["annotations", "no.json", "not in the archive"]),
        (str(tmp_path / "empty"), file, ["has none of the 3 images", "empty/10.png"]),
        (archive + "/elsewhere", file, ["none of the 3 images", "images.zip/elsewhere/10.png"]),
    ]
    for images, annotations, parts in cases:
        refuses(partial(open_coco, images, annotations), *parts, error=UserError)


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
    (box(9, 10, iscrowd="no"), "its iscrowd 'no' is not 0 or 1"),
    (box(9, 10, iscrowd=2), "its iscrowd 2 is not 0 or 1"),
    ("ant", "'ant' is not an annotation"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_ANNOTATIONS)
def test_bad_annotation_is_skipped_and_named_or_fails(tmp_path: Path, bad, reason: str):
    data = instances()
    data["annotations"].insert(1, bad)
    folder, file = write_set(tmp_path, data)
    source = open_coco(folder, file)
    assert len(source.left_out) == 1
    assert reason in source.left_out[0]
    label = "9" if isinstance(bad, dict) else "None"
    assert source.left_out[0].startswith(f"annotation {label} (number 1 of the list): ")
    # Everything else is there, in training and in the ground truth.
    assert [len(source.read(index)[1].boxes) for index in range(3)] == [2, 0, 2]
    assert len(indexed(source.ground_truth()).anns) == 4
    with pytest.raises(UserError) as caught:
        open_coco(folder, file, on_bad_annotation="fail")
    assert reason in str(caught.value)
    assert "on_bad_annotation: skip would leave it out" in str(caught.value)


SCALARS = [
    # how an annotation has area and iscrowd, and what is read
    ({"area": None, "iscrowd": 0}, 35, False),
    ({"area": "25", "iscrowd": "0"}, 25, False),
    ({"area": 25, "iscrowd": "1"}, 25, True),
    ({"area": 0, "iscrowd": None}, 0, False),
    ({"area": 2.5, "iscrowd": True}, 2.5, True),
    ({"area": 2.5, "iscrowd": 0.0}, 2.5, False),
]


@pytest.mark.parametrize(("given", "area", "crowd"), SCALARS)
def test_scalars_are_read_alike(tmp_path: Path, given: dict, area: float, crowd: bool):
    data = instances()
    data["annotations"] = [{**box(9, 10), **given}]
    data["images"] = data["images"][1:2]
    folder, file = write_set(tmp_path, data)
    data["images"][0]["height"] = float(data["images"][0]["height"])
    Path(file).write_text(json.dumps(data))
    source = open_coco(folder, file)
    found = source.read(0)[1]
    assert source.left_out == []
    assert (found.area.tolist(), found.iscrowd.tolist()) == ([area], [crowd])


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
    assert len(source.left_out) == 1
    assert reason in source.left_out[0]
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
    (reason,) = source.left_out
    assert f"image 10: no file '{folder}" in reason
    assert "10.png'; it has 2 annotations" in reason
    truth = indexed(source.ground_truth())
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
