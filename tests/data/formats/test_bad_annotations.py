"""Whatever stands in an annotation file, the outcome is entries or one line that names file and place."""

import copy
import gzip
import json
import os
from pathlib import Path

import pytest
from fuzz.test_annotations import DOCUMENTS, GOLDEN

from groundingdino.data import load_expressions, load_training
from groundingdino.data.convert import convert
from groundingdino.data.formats.record import Kind, ReadOptions, file_name_problem
from groundingdino.data.formats.registry import read, read_splits

DEEP = "[" * 200_000 + "]" * 200_000
SIZE = "<size><width>9</width><height>9</height></size>"
LAUGHS = '<!DOCTYPE a [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]><annotation><filename>&b;</filename></annotation>'
REFERENCES = "a: &a [x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 8)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", f'{{"images": {DEEP}, "annotations": []}}', "JSON nested too deeply"),
        ("a.json", '{"images": [{"id": 1, "licence": "\\ud83d"}], "annotations": []}', "half of a surrogate pair"),
        ("a.json", '{"images": [], "annotations": [', "not JSON .Input data was truncated"),
        ("a.json", f'{{"filename": "a", "width": 9, "height": 9, "{"x" * 3000}": "\\ud83d"}}', "surrogate"),
        (
            "a.json",
            '{"filename": "a", "width": 9, "height": 9, "grounding": {"caption": "'
            + "a" * 3000
            + '", "regions": [{"bbox": [1, 1, 5, 5], "phrase": "b"}]}}',
            "names nothing",
        ),
        ("a.json", '{"images": 5, "annotations": []}', r"Expected `array.*`, got `int` - at `\$.images`"),
        ("a.json", f'{{"filename": "a", "width": 1, "height": 1, "x": {DEEP}}}', "JSON nested too deeply"),
        (
            "a.json",
            '{"filename": "\\ud83d.jpg", "width": 1, "height": 1}',
            "line 1: not JSON .half of a surrogate pair",
        ),
        ("a.json", '{"filename": "a", "width": NaN, "height": 1}', "line 1: not JSON .NaN and Infinity"),
        (
            "a.json",
            '{"filename": "a", "width": 9999999999999999999999, "height": 1, "detection": {}}',
            "not a picture's",
        ),
        ("a.json", '{"filename": 5, "width": 1, "height": 1}', r"line 1: Expected `str`, got `int` - at `\$.filename`"),
        ("a.json", '{"filename": "../a", "width": 1, "height": 1, "detection": {}}', "leaves the image folder"),
        ("a.json", '{"filename": "/a", "width": 1, "height": 1, "detection": {}}', "is absolute"),
        (
            "a.xml",
            f"<annotation><filename>{'x' * 400}.jpg</filename>{SIZE}</annotation>",
            "cannot be the name of a file",
        ),
        ("a.csv", f"{'x' * 400}.jpg,1,2,30,40,cat\\n", "cannot be the name of a file"),
        ("a.xml", LAUGHS, "declares XML entities"),
        ("a.xml", "<annotation><filename>a</filename>", "not XML"),
        ("a.xml", "<annotations><track/><image/></annotations>", "tracks of a video"),
        ("data.yaml", REFERENCES + "names: *j\n", "names of data.yaml are neither"),
        ("data.yaml", "names: [" * 5000, "nested over 50 deep"),
    ],
)
def test_each_fault_is_one_line(tmp_path: Path, name: str, content: str, message: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}.*{message}") as caught:
        found = [p for reading in read_splits(tmp_path / name).values() for e in reading for p in e.problems]
        raise ValueError(str(found[0]))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_names_outside_the_image_folder_need_a_flag(tmp_path: Path):
    (tmp_path / "a.json").write_text('{"filename": "../a.jpg", "width": 9, "height": 9, "detection": {}}')
    (entry,) = read(tmp_path / "a.json", ReadOptions(allow_outside=True))
    assert entry.usable and entry.file_name == "../a.jpg"
    (entry,) = read(tmp_path / "a.json")
    assert not entry.usable and entry.problems[0].kind is Kind.FILE_NAME
    with pytest.raises(ValueError, match="leaves the image folder"):
        load_training(tmp_path / "a.json", _label_map(tmp_path)).entry(0)


def _label_map(folder: Path) -> Path:
    (folder / "map.json").write_text('{"0": "cat"}')
    return folder / "map.json"


@pytest.mark.parametrize(
    ("name", "fine"),
    [
        ("a.jpg", True), ("train/a b.jpg", True), ("a..b.jpg", True), ("é.jpg", True), ("", False), ("/a.jpg", False),
        ("../a.jpg", False), ("x/../../a.jpg", False), ("C:\\a.jpg", False), ("\\a.jpg", False), ("x\\..\\a", False),
        ("a\0.jpg", False), ("a" * 300, False), ("a/" * 3000, False),
    ],
)  # fmt: skip
def test_file_names(name: str, fine: bool):
    assert (file_name_problem(name) is None) is fine


def test_a_pipe_or_a_device_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "a.json")
    for path in (tmp_path / "a.json", Path("/dev/zero")):
        for attempt in (read, load_training, load_expressions):
            with pytest.raises(ValueError, match=str(path)):
                attempt(path)


def test_a_small_file_that_unpacks_to_gigabytes_is_refused(tmp_path: Path):
    with gzip.open(tmp_path / "a.json", "wb") as file:
        for _ in range(100):
            file.write(b" " * (1 << 20))
    with pytest.raises(ValueError, match="a.json: unpacks to over 64 MiB"):
        read(tmp_path / "a.json")


def test_a_caption_of_ten_megabytes_is_refused(tmp_path: Path):
    line = json.loads((GOLDEN / "converters" / "final_mixed_train_vg.json").read_text().splitlines()[0])
    line["grounding"]["caption"] += " and so on" * 1_000_000
    (tmp_path / "a.json").write_text(json.dumps(line))
    with pytest.raises(ValueError, match="a.json: line 1: the caption is 10,000,047 characters long"):
        load_training(tmp_path / "a.json").entry(0)


def test_what_is_not_read_may_be_damaged_and_is_not_written_on(tmp_path: Path):
    text = json.dumps(DOCUMENTS["coco"]).replace('"segmentation": []', '"segmentation": [1e999]')
    (tmp_path / "a.json").write_text(text)
    convert(tmp_path / "a.json", tmp_path / "b.json", "coco")
    assert [[t.box for t in e.objects] for e in read(tmp_path / "b.json")] == [
        [t.box for t in e.objects] for e in read(tmp_path / "a.json")
    ]


def test_one_bad_entry_does_not_hide_the_others(tmp_path: Path):
    document = copy.deepcopy(DOCUMENTS["coco"])
    document["images"][0]["width"] = "wide"
    (tmp_path / "a.json").write_text(json.dumps(document))
    entries = list(read(tmp_path / "a.json"))
    assert [entry.usable for entry in entries].count(False) == 1 and len(entries) == 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"image_id": "x" * 5000}, "no image has the id 'xxx"),
        ({"bbox": [90, 1, 5, 5]}, "lies outside the 50x50 image"),
        ({"bbox": [1, 1, 0, 5]}, "has no area"),
        ({"bbox": [1, 1, 5]}, "Expected `array` of length 4"),
        ({"bbox": [1, 1, 5, None]}, "Expected `int | float`"),
        ({"image_id": 7}, "no image has the id 7"),
    ],
)
def test_evaluation_data_are_checked_as_training_data_are(tmp_path: Path, fault: dict, message: str):
    image = {"id": 1, "file_name": "a.jpg", "width": 50, "height": 50, "caption": "cup"}
    box = {"image_id": 1, "bbox": [1, 1, 9, 9], "tokens_positive": [[0, 3]], **fault}
    (tmp_path / "a.json").write_text(json.dumps({"images": [image], "annotations": [box]}))
    for load in (load_expressions, load_training):
        with pytest.raises(ValueError) as caught:
            load(tmp_path / "a.json")
        assert message in str(caught.value) and "a.json: " in str(caught.value) and len(str(caught.value)) < 1000


def test_expressions_know_the_size_that_their_boxes_belong_to(golden: Path):
    expressions = load_expressions(golden / "data" / "mdetr_annotations" / "final_refexp_val.json")
    assert expressions[0].size == (451, 347)
