"""Reading ODVG and MDETR files: equal entries, small indexes, and faults named by file and line."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from groundingdino.data import annotations as module
from groundingdino.data import load_expressions, load_odvg, load_refcoco, load_training

FOLDER = Path(__file__).parent.parent / "golden" / "data" / "mdetr_annotations"
MDETR, ODVG = FOLDER / "finetune_refcoco_train.json", FOLDER / "finetune_refcoco_train_vg.json"

LINE = {
    "filename": "a.jpg",
    "height": 100,
    "width": 200,
    "grounding": {
        "caption": "Red cup and a saucer",
        "regions": [
            {"bbox": [10, 10, 50, 50], "phrase": "Red cup", "tokens_positive": [[0, 7]]},
            {"bbox": [[1, 2, 30, 40], [60, 10, 90, 90]], "phrase": "a saucer", "tokens_positive": [[12, 20]]},
        ],
    },
}


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def edited(**changes: object) -> dict:
    """LINE with other regions or other fields."""
    line = json.loads(json.dumps(LINE))
    if "regions" in changes:
        line["grounding"]["regions"] = changes.pop("regions")
    return {**line, **changes}


def test_refcoco_json_and_its_odvg_conversion_give_the_same_entries():
    direct, converted = load_training(MDETR, on_bad_sample="skip"), load_training(ODVG)
    assert len(direct) == len(converted) == 41
    assert direct.portrait.tolist() == converted.portrait.tolist()
    for index in range(len(direct)):
        ours, theirs = direct.entry(index), converted.entry(index)
        assert (ours.file_name, ours.caption, ours.spans) == (theirs.file_name, theirs.caption, theirs.spans)
        np.testing.assert_array_equal(ours.boxes, theirs.boxes)
        np.testing.assert_array_equal(ours.labels, theirs.labels)
    assert direct.problems and converted.problems == ()


def test_a_region_with_several_boxes_becomes_several_objects_of_one_label(tmp_path: Path):
    entry = load_odvg(write(tmp_path / "a.json", LINE)).entry(0)
    assert entry.labels.tolist() == [0, 1, 1]
    assert entry.boxes.tolist() == [[10, 10, 50, 50], [1, 2, 30, 40], [60, 10, 90, 90]]
    assert entry.spans == (((0, 7),), ((12, 20),))


def test_blank_lines_are_passed_over_and_line_numbers_stay_true(tmp_path: Path):
    opened = load_odvg(write(tmp_path / "a.json", "", LINE, "", edited(filename="b.jpg", height=300), ""))
    assert [opened.entry(n).file_name for n in range(len(opened))] == ["a.jpg", "b.jpg"]
    assert opened.where(1).endswith("a.json: line 4")
    assert opened.portrait.tolist() == [False, True]


def test_orientation_is_found_wherever_the_sides_stand_in_the_line(tmp_path: Path):
    late = {"filename": "x" * 500, "grounding": LINE["grounding"], "width": 100, "height": 200}
    assert load_odvg(write(tmp_path / "a.json", late, LINE)).portrait.tolist() == [True, False]


def test_an_opened_file_holds_bytes_and_not_objects(tmp_path: Path):
    opened = load_odvg(write(tmp_path / "a.json", *[LINE] * 1000))
    assert len(pickle.dumps(opened)) < 25 * 1000
    assert opened.entry(999).caption == LINE["grounding"]["caption"]


def test_spans_that_are_not_given_are_found_by_the_phrase(tmp_path: Path):
    regions = [{"bbox": [1, 1, 9, 9], "phrase": "red CUP"}, {"bbox": [1, 1, 9, 9], "phrase": ["red", "saucer"]}]
    entry = load_odvg(write(tmp_path / "a.json", edited(regions=regions))).entry(0)
    assert entry.spans == (((0, 7),), ((0, 3), (14, 20)))


def test_boxes_outside_or_without_area_are_left_out_and_named_with_file_and_line(tmp_path: Path):
    boxes = [[-5, -5, 20, 20], [300, 10, 340, 50], [10, 10, 10, 50], [50, 10, 20, 50], [10, 10, 10.5, 50]]
    regions = [{"bbox": boxes, "phrase": "cup", "tokens_positive": [[4, 7]]}]
    entry = load_odvg(write(tmp_path / "a.json", LINE, edited(regions=regions))).entry(1)
    assert entry.boxes.tolist() == [[-5, -5, 20, 20]]
    assert len(entry.problems) == 4 and all("a.json: line 2: object" in problem for problem in entry.problems)
    assert "[300, 10, 340, 50] (x1, y1, x2, y2) lies outside the 200x100 image" in entry.problems[0]
    assert "has no area" in entry.problems[3]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"filename": "a.jpg", ', "line 2: not JSON"),
        ({"filename": "a.jpg", "height": 1}, "line 2: Object missing required field `width`"),
        ({"filename": "a.jpg", "height": 1, "width": 1}, r"line 2: it has neither a caption \(grounding\) nor boxes"),
        (edited(detection={}, grounding=None), "line 2: detection data needs a label map"),
        (edited(regions=[{"bbox": [1, 1, 9, 9]}]), "line 2: a region names nothing"),
        (edited(regions=[{"bbox": [1, 1, 9, 9], "phrase": "dog"}]), "line 2: a region names nothing"),
        (edited(regions=[{"bbox": [1, 1, 9], "phrase": "cup"}]), r"line 2: expected a box \[x1, y1, x2, y2\]"),
        (edited(width="wide"), r"line 2: Expected `int`, got `str` - at `\$.width`"),
        (
            edited(regions=[{"bbox": [1, 1, 9, 9], "tokens_positive": [[15, 25]]}]),
            r"line 2: span \[15, 25\] is not inside the caption of 20 characters",
        ),
        (
            {"filename": "a.jpg", "height": 9, "width": 9, "detection": {"instances": []}},
            "line 2: detection data needs a label map",
        ),
    ],
)
def test_a_faulty_line_is_named(tmp_path: Path, line: object, message: str):
    opened = load_odvg(write(tmp_path / "a.json", LINE, line))
    with pytest.raises(ValueError, match=rf"a.json: {message}"):
        opened.entry(1)


def test_detection_data_is_read_with_its_label_map(tmp_path: Path):
    instances = [{"bbox": [1, 1, 9, 9], "label": 2, "category": "dog"}, {"bbox": [3, 3, 8, 8], "label": "0"}]
    line = {"filename": "a.jpg", "height": 10, "width": 10, "detection": {"instances": instances}}
    none = {"filename": "b.jpg", "height": 10, "width": 10}
    unknown = {**line, "detection": {"instances": [{"bbox": [1, 1, 9, 9], "label": 7}]}}
    write(tmp_path / "map.json", {"0": "cat", "2": "dog"})
    opened = load_training(write(tmp_path / "a.json", line, none, unknown), tmp_path / "map.json")
    entry = opened.entry(0)
    assert entry.caption is None and entry.labels.tolist() == [2, 0]
    assert opened.label_map == {0: "cat", 2: "dog"}
    assert len(opened.entry(1).boxes) == 0
    with pytest.raises(ValueError, match="a.json: line 3: label 7 is not in the label map"):
        opened.entry(2)
    with pytest.raises(ValueError, match="a.json: expected a label map"):
        load_odvg(tmp_path / "a.json", tmp_path / "a.json")


def test_with_stop_the_first_unusable_box_of_a_refcoco_file_is_named():
    with pytest.raises(
        ValueError, match=r"finetune_refcoco_train.json: images entry 1: annotations entry 1: box .* has no area"
    ):
        load_refcoco(MDETR)
    opened = load_refcoco(MDETR, on_bad_sample="skip")
    assert len(opened.problems) >= 60 - 41
    assert opened.where(0) == f"{MDETR}: images entry 2"


def test_missing_empty_and_foreign_files_are_named(tmp_path: Path):
    for load in (load_training, load_odvg, load_refcoco, load_expressions):
        with pytest.raises(ValueError, match="gone.json"):
            load(tmp_path / "gone.json")
    (tmp_path / "empty.json").write_text("\n")
    with pytest.raises(ValueError, match="empty.json"):
        load_training(tmp_path / "empty.json")
    (tmp_path / "foreign.json").write_text("[1,\n 2]")
    with pytest.raises(ValueError, match="foreign.json: no annotations in a known format"):
        load_training(tmp_path / "foreign.json")


def test_a_document_spread_over_lines_is_recognised_too(tmp_path: Path):
    (tmp_path / "a.json").write_text(json.dumps(json.loads(MDETR.read_text()), indent=1))
    assert len(load_training(tmp_path / "a.json", on_bad_sample="skip")) == 41


def test_expressions_keep_every_entry_in_the_order_of_the_file_and_unclipped_boxes():
    path = FOLDER / "final_refexp_val.json"
    document = json.loads(path.read_text())
    expressions = load_expressions(path)
    assert [e.sample_id for e in expressions] == [image["id"] for image in document["images"]]
    box = {a["image_id"]: a["bbox"] for a in document["annotations"]}
    for expression, image in zip(expressions, document["images"], strict=True):
        x, y, w, h = box[image["id"]]
        assert expression.box == (x, y, x + w, y + h)
        assert expression.dataset_name == image["dataset_name"]


@pytest.mark.parametrize(
    ("image", "annotations", "message"),
    [
        ({}, [], "entry 1: it has no annotation"),
        ({}, [[1, 1, 0, 5]], r"entry 1: annotations entry 1: box \[1, 1, 0, 5\] .* has no area"),
        ({"caption": ""}, [[1, 1, 5, 5]], "entry 1: caption missing or empty"),
    ],
)
def test_an_expression_that_cannot_be_evaluated_is_named(tmp_path: Path, image: dict, annotations: list, message: str):
    image = {"id": 1, "file_name": "a.jpg", "width": 9, "height": 9, "caption": "cup", **image}
    boxes = [{"id": n, "image_id": 1, "bbox": box} for n, box in enumerate(annotations)]
    path = write(tmp_path / "val.json", {"images": [image], "annotations": boxes})
    with pytest.raises(ValueError, match=rf"val.json: images {message}"):
        load_expressions(path)


def test_the_module_reads_sides_only_at_the_top_of_long_lines():
    line = b'{"filename": "a", "height": 5, "width": 9, "x": "' + b"y" * 500 + b'", "width": 1}'
    # Its answer shows only in how a batch is grouped, where either answer is right: looked at directly.
    assert not module._is_portrait(line)
