"""Conversions: mmdet's own, line for line, and round trips that lose nothing both formats can say."""

import json
from pathlib import Path

import pytest
from PIL import Image

from groundingdino.data.convert import convert, convert_file
from groundingdino.data.formats.record import Reading, ReadOptions
from groundingdino.data.formats.registry import read, read_splits

ANNOTATIONS = Path(__file__).parent.parent / "golden" / "data" / "mdetr_annotations"
MDETR = ANNOTATIONS / "finetune_refcoco_train.json"
REFCOCO = "data/mdetr_annotations/finetune_refcoco_train"
SIZES = {"2007_000027": (486, 500), "2007_000032": (500, 281), "2007_000129": (334, 500)}


@pytest.mark.parametrize(
    ("source", "expected", "label_map"),
    [
        ("converters/instances_coco.json", "converters/instances_coco_od.json", None),
        ("converters/lvis_v1.json", "converters/lvis_v1_od.json", "converters/lvis_v1_label_map.json"),
        ("converters/final_mixed_train.json", "converters/final_mixed_train_vg.json", None),
        (f"{REFCOCO}.json", f"{REFCOCO}_vg.json", None),
    ],
)
def test_odvg_is_mmdets_line_for_line(golden: Path, tmp_path: Path, source: str, expected: str, label_map: str | None):
    written = convert(golden / source, tmp_path / "out.jsonl", "odvg")
    ours, theirs = ((path).read_text().splitlines() for path in (tmp_path / "out.jsonl", golden / expected))
    assert ours == theirs
    assert written.counts == {"all": len(theirs)}
    if label_map is not None:
        assert (tmp_path / "out_label_map.json").read_text() == (golden / label_map).read_text()


def test_cocos_own_categories_are_numbered_as_mmdet_numbers_all_80(golden: Path, tmp_path: Path):
    convert(golden / "converters" / "instances_coco.json", tmp_path / "out.jsonl", "odvg")
    ours = json.loads((tmp_path / "out_label_map.json").read_text())
    theirs = json.loads((golden / "converters" / "coco2017_label_map.json").read_text())
    assert len(ours) == 6 and ours.items() <= theirs.items()


def test_openimages_is_numbered_by_its_descriptions_and_flagged_boxes_are_left_out(tmp_path: Path):
    """As mmdet's openimages2odvg: names from class-descriptions, boxes clipped to the image, every flag leaves out."""
    Image.new("RGB", (200, 100)).save(tmp_path / "abc.jpg")
    (tmp_path / "class-descriptions-boxable.csv").write_text("/m/1,Tortoise\n/m/2,Container\n")
    flags = ["0,0,0,0,0", "1,0,0,0,0", "0,1,0,0,0", "0,0,1,0,0", "0,0,0,1,0", "0,0,0,0,1"]
    rows = [f"abc,xclick,/m/2,1,0.25,0.5,0.1,0.2,{flag}" for flag in flags]
    header = (
        "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
    )
    (tmp_path / "train-annotations-bbox.csv").write_text("\n".join([header, *rows]) + "\n")
    written = convert(tmp_path / "train-annotations-bbox.csv", tmp_path / "out.jsonl", "odvg")
    line = {"filename": "abc.jpg", "height": 100, "width": 200}
    instances = [{"bbox": [50.0, 10.0, 100.0, 20.0], "label": 1, "category": "Container"}]
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {**line, "detection": {"instances": instances}}
    assert json.loads((tmp_path / "out_label_map.json").read_text()) == {"0": "Tortoise", "1": "Container"}
    assert len(written.problems) == 1 and "5 boxes" in str(written.problems[0])


@pytest.fixture
def voc(golden: Path, tmp_path: Path) -> Path:
    """Three VOC files beside blank images."""
    folder = tmp_path / "voc"
    folder.mkdir()
    for name, size in SIZES.items():
        Image.new("RGB", size).save(folder / f"{name}.jpg")
        (folder / f"{name}.xml").write_bytes((golden / "formats" / "voc" / f"{name}.xml").read_bytes())
    return folder


def content(reading: Reading, flags: frozenset[str] = frozenset()) -> list[tuple]:
    """Everything about the objects, with those of the flags that both formats can say."""
    return sorted(
        (
            Path(e.file_name).name,
            e.width,
            e.height,
            t.name,
            *(round(side, 3) for side in t.box),
            *sorted(t.flags & flags),
        )
        for e in reading
        for t in e.objects
    )


@pytest.mark.parametrize(
    ("to", "flags"),
    [("coco", {"difficult", "truncated", "occluded"}), ("voc", {"difficult", "truncated"}), ("yolo", set())],
)
def test_a_round_trip_loses_nothing_that_both_formats_can_say(voc: Path, tmp_path: Path, to: str, flags: set):
    written = convert(voc, tmp_path / "there", to)  # type: ignore[arg-type]
    images = ReadOptions(images=voc) if to == "coco" else None
    there = read(tmp_path / "there", images)
    assert content(there, frozenset(flags)) == content(read(voc), frozenset(flags))
    assert written.problems == [] and written.objects == 11
    convert(tmp_path / "there", tmp_path / "back", "voc", images, place_images="copy")
    assert content(read(tmp_path / "back"), frozenset(flags)) == content(read(voc), frozenset(flags))
    assert not (tmp_path / "back" / "JPEGImages" / "2007_000027.jpg").is_symlink()


def test_coco_to_coco_keeps_masks_licences_and_ids(golden: Path, tmp_path: Path):
    source = golden / "converters" / "instances_coco.json"
    convert(source, tmp_path / "out.json", "coco")
    before, after = json.loads(source.read_text()), json.loads((tmp_path / "out.json").read_text())
    assert after["categories"] == before["categories"] and after["images"] == before["images"]
    without_area = {3}  # the annotation that is half a pixel wide
    key = {a["id"]: a for a in before["annotations"] if a["id"] not in without_area}
    assert {a["id"]: a for a in after["annotations"]} == key


def test_odvg_survives_odvg(tmp_path: Path):
    for name, source in [("vg", ANNOTATIONS / "finetune_refcoco_train_vg.json"), ("od", None)]:
        if source is None:
            convert(ANNOTATIONS.parent.parent / "converters" / "lvis_v1.json", tmp_path / "od_first.jsonl", "odvg")
            source = tmp_path / "od_first.jsonl"
        convert(source, tmp_path / f"{name}.jsonl", "odvg")
        ours, theirs = (tmp_path / f"{name}.jsonl").read_text().splitlines(), source.read_text().splitlines()
        assert [json.loads(line) for line in ours] == [json.loads(line) for line in theirs]


def test_phrases_become_categories_and_captions_of_one_image_meet(tmp_path: Path):
    images = [{"id": n, "file_name": "a.jpg", "width": 90, "height": 90, "caption": c} for n, c in enumerate("ab")]
    boxes = [{"image_id": n, "bbox": [1, 1, 9, 9], "tokens_positive": [[0, 1]]} for n in range(2)]
    (tmp_path / "in.json").write_text(json.dumps({"images": images, "annotations": boxes}))
    convert(tmp_path / "in.json", tmp_path / "out.json", "coco")
    document = json.loads((tmp_path / "out.json").read_text())
    assert len(document["images"]) == 1 and [a["category_id"] for a in document["annotations"]] == [1, 2]
    assert document["categories"] == [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]


def test_every_split_is_written(voc: Path, tmp_path: Path):
    (voc / "ImageSets" / "Main").mkdir(parents=True)
    (voc / "ImageSets" / "Main" / "train.txt").write_text("2007_000027\n2007_000032\n")
    (voc / "ImageSets" / "Main" / "val.txt").write_text("2007_000129\n")
    convert(voc, tmp_path / "out", "yolo")
    splits = read_splits(tmp_path / "out")
    assert {name: len(list(reading)) for name, reading in splits.items()} == {"train": 2, "val": 1}
    with pytest.raises(ValueError, match="train, val"):
        convert(voc, tmp_path / "out.json", "coco")


def test_boxes_outside_the_image_are_left_out_and_named(tmp_path: Path):
    document = json.loads(MDETR.read_text())
    document["annotations"][1]["bbox"] = [600, 10, 40, 40]
    (tmp_path / "train.json").write_text(json.dumps(document))
    _, notes = convert_file(tmp_path / "train.json", tmp_path / "out.json")
    assert any(
        "images entry 2: annotations entry 2: box [600, 10, 40, 40]" in n and "outside the 489x263" in n for n in notes
    )


def test_nothing_is_written_where_nothing_can_be_read_nor_over_what_is_read(tmp_path: Path):
    (tmp_path / "a.json").write_text('{"images": [{"id": 1}], "annotations": []}')
    with pytest.raises(ValueError, match=r"a.json: no usable entry \(.*images entry 1"):
        convert(tmp_path / "a.json", tmp_path / "out.json", "coco")
    with pytest.raises(ValueError, match="is what is read"):
        convert(MDETR, MDETR, "odvg")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
