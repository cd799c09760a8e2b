"""MDETR -> ODVG against mmdet's own conversion of the golden file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from groundingdino.data import convert

ANNOTATIONS = Path(__file__).parent.parent / "golden" / "data" / "mdetr_annotations"
MDETR = ANNOTATIONS / "finetune_refcoco_train.json"


def test_the_conversion_is_mmdets_line_for_line(tmp_path: Path):
    written, notes = convert.convert_file(MDETR, tmp_path / "vg.json")
    ours = (tmp_path / "vg.json").read_text().splitlines()
    theirs = (ANNOTATIONS / "finetune_refcoco_train_vg.json").read_text().splitlines()
    assert ours == theirs
    assert written == len(theirs) < len(json.loads(MDETR.read_text())["images"])
    assert notes and all(str(MDETR) in note and "images entry" in note for note in notes)
    assert [path.name for path in tmp_path.iterdir()] == ["vg.json"]


def test_the_conversion_is_a_command(tmp_path: Path):
    command = [sys.executable, "-m", "groundingdino.data.convert"]
    done = subprocess.run([*command, MDETR, tmp_path / "vg.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "vg.json").read_text() == (ANNOTATIONS / "finetune_refcoco_train_vg.json").read_text()
    assert "41 lines written" in done.stdout
    failed = subprocess.run([*command, tmp_path / "gone.json", tmp_path / "x.json"], capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.splitlines() == [
        f"error: {tmp_path / 'gone.json'}: no such annotation file"
    ]


def test_a_file_of_another_format_or_with_a_field_missing_is_named_and_nothing_is_written(tmp_path: Path):
    (tmp_path / "vg.json").write_text('{"filename": "a.jpg"}')
    with pytest.raises(ValueError, match="vg.json: expected an MDETR annotation file"):
        convert.convert_file(tmp_path / "vg.json", tmp_path / "out.json")
    document = json.loads(MDETR.read_text())
    del document["images"][3]["caption"]
    (tmp_path / "train.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"train.json: images entry 4 \(id 3\): field 'caption' is missing"):
        convert.convert_file(tmp_path / "train.json", tmp_path / "out.json")
    for fault, message in [
        ({"bbox": [1, 2, 3]}, r"images entry 1 \(id 0\): malformed"),
        ({"bbox": None}, r"images entry 1 \(id 0\): malformed"),
        ({"image_id": "gone"}, r"annotations entry 1: field 'image_id' is missing"),
    ]:
        document = json.loads(MDETR.read_text())
        document["annotations"][0] |= fault
        if "image_id" in fault:
            del document["annotations"][0]["image_id"]
        (tmp_path / "train.json").write_text(json.dumps(document))
        with pytest.raises(ValueError, match=f"train.json: {message}"):
            convert.convert_file(tmp_path / "train.json", tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_boxes_outside_the_image_are_left_out_and_named(tmp_path: Path):
    document = json.loads(MDETR.read_text())
    document["annotations"][1]["bbox"] = [600, 10, 40, 40]
    (tmp_path / "train.json").write_text(json.dumps(document))
    _, notes = convert.convert_file(tmp_path / "train.json", tmp_path / "out.json")
    assert any("images entry 2: box [600, 10, 40, 40]" in note and "lies outside the 489x263" in note for note in notes)
