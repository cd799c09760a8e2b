"""Every format is found by its content and read into the same boxes; what is wrong is said in one line."""

import gzip
import json
from pathlib import Path

import pytest
from PIL import Image

from groundingdino.data import load_training
from groundingdino.data.formats.odvg import flags_left_out
from groundingdino.data.formats.record import Kind, Reading, ReadOptions
from groundingdino.data.formats.registry import find_format, read, read_splits

SIZES = {"2007_000027": (486, 500), "2007_000032": (500, 281), "2007_000129": (334, 500)}
SAME_BOXES = {  # one truth; three images of rafaelpadilla/review_object_detection_metrics
    "coco_v1.json": "coco",
    "coco_v2.json": "coco",
    "voc": "voc",
    "imagenet": "voc",
    "yolo": "yolo",
    "openimages.csv": "openimages",
    "cvat.xml": "cvat",
    "labelme": "labelme",
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Blank images of the sizes that the annotations say; YOLO and OpenImages read their sizes."""
    (tmp_path / "images").mkdir()
    for name, size in SIZES.items():
        Image.new("RGB", size).save(tmp_path / "images" / f"{name}.jpg")
    return tmp_path / "images"


def boxes(reading: Reading) -> list[tuple]:
    """(file, category, rounded box) of all objects, sorted."""
    return sorted(
        (entry.file_name, thing.name, *(round(side) for side in thing.box))
        for entry in reading
        for thing in entry.objects
    )


def problems(reading: Reading) -> list[str]:
    """All problems as they are printed."""
    return [str(p) for p in reading.problems] + [str(p) for entry in reading for p in entry.problems]


@pytest.mark.parametrize(("name", "found"), SAME_BOXES.items())
def test_eight_formats_give_the_same_boxes(golden: Path, images: Path, name: str, found: str):
    options = ReadOptions(images=images)
    reading = read(golden / "formats" / name, options)
    assert reading.format == found
    assert boxes(reading) == boxes(read(golden / "formats" / "voc", options))
    assert len(boxes(reading)) == 11
    assert [(entry.width, entry.height) for entry in sorted(reading, key=lambda e: e.file_name)] == list(SIZES.values())


def test_decimal_commas_are_read_and_said(golden: Path, images: Path):
    said = problems(read(golden / "formats" / "openimages.csv", ReadOptions(images=images)))
    assert len(said) == 1 and "openimages.csv: line 2: decimal commas, in 11 rows in all" in said[0]


@pytest.mark.parametrize("header", ["filename,width,height,class,xmin,ymin,xmax,ymax", "image;label;x1;y1;x2;y2"])
def test_tables_are_read_by_the_names_of_their_columns(tmp_path: Path, header: str):
    values = {"filename": "a.jpg", "image": "a.jpg", "width": "90", "height": "80", "class": "cat", "label": "cat"}
    corners = dict(zip(("xmin", "ymin", "xmax", "ymax", "x1", "y1", "x2", "y2"), "12345678", strict=True))
    delimiter = ";" if ";" in header else ","
    row = delimiter.join({**values, **corners}[column] for column in header.split(delimiter))
    (tmp_path / "a.csv").write_text(f"{header}\n{row}\n")
    (entry,) = read(tmp_path / "a.csv")
    assert entry.file_name == "a.jpg" and entry.objects[0].name == "cat"
    assert entry.objects[0].box == ((1, 2, 3, 4) if delimiter == "," else (5, 6, 7, 8))


def test_a_table_without_header_is_read_as_keras_retinanet_writes_it(tmp_path: Path):
    (tmp_path / "a.csv").write_text("a.jpg,1,2,30,40,cat\nb.jpg,1,2,3,oops,cat\n")
    first, second = read(tmp_path / "a.csv")
    assert first.objects[0].box == (1, 2, 30, 40)
    assert str(second.problems[0]) == f"{tmp_path / 'a.csv'}: line 2: 'oops' is not a number"


def yolo_folder(root: Path, layout: str) -> Path:
    """Two images with a box each, in one of the layouts that people have."""
    folders = {
        "ultralytics": [("images/train", "labels/train"), ("images/val", "labels/val")],
        "roboflow": [("train/images", "train/labels"), ("valid/images", "valid/labels")],
    }
    for images, labels in folders.get(layout, [(".", ".")]):
        (root / images).mkdir(parents=True, exist_ok=True)
        (root / labels).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (100, 50)).save(root / images / "a.png")
        (root / labels / "a.txt").write_text("1 0.5 0.5 0.2 0.4\n")
    yaml = {
        "ultralytics": "path: .\ntrain: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n",
        "roboflow": "train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['cat', 'dog']\n",
    }
    if layout in yaml:
        (root / "data.yaml").write_text(yaml[layout])
    else:
        (root / "classes.txt").write_text("cat\ndog\n")
    return root


@pytest.mark.parametrize("layout", ["ultralytics", "roboflow", "beside the images"])
def test_yolo_layouts_old_and_new(tmp_path: Path, layout: str):
    splits = read_splits(yolo_folder(tmp_path, layout))
    (entry,) = splits["train" if "train" in splits else "all"]
    assert (entry.width, entry.height) == (100, 50)
    assert entry.objects[0].name == "dog" and entry.objects[0].box == pytest.approx((40, 15, 60, 35))
    assert set(splits) == ({"train", "val"} if layout != "beside the images" else {"all"})
    assert (tmp_path / entry.file_name).is_file()


def test_rows_of_polygons_are_read_as_their_bounding_boxes_and_bad_rows_are_named(tmp_path: Path):
    yolo_folder(tmp_path, "beside the images")
    (tmp_path / "a.txt").write_text(
        "0 0.1 0.2 0.3 0.2 0.3 0.6\n7 0.5 0.5 0.1 0.1\n0 0.5 0.5\n0 40 15 20 20\n0 a b c d\n"
    )
    reading = read(tmp_path)
    assert [thing.box for entry in reading for thing in entry.objects] == [pytest.approx((10, 10, 30, 30))]
    said = problems(reading)
    assert [text.split(": ")[1] for text in said] == ["line 2", "line 3", "line 4", "line 5"]
    assert "class 7 is not among the 2 names" in said[0]


def test_splits_are_found_by_the_usual_names(golden: Path, tmp_path: Path):
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        document = (golden / "formats" / "coco_v1.json").read_text()
        (tmp_path / split / "_annotations.coco.json").write_text(document)
    assert {name: reading.format for name, reading in read_splits(tmp_path).items()} == {"train": "coco", "val": "coco"}


def test_the_splits_of_a_voc_folder_are_its_lists_and_share_their_categories(golden: Path, tmp_path: Path):
    source = golden / "formats" / "voc"
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    for file in source.iterdir():
        (tmp_path / "Annotations" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("2007_000027\n")
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("2007_000032\n2007_000129 -1\n")
    splits = read_splits(tmp_path)
    assert [len(list(splits[name])) for name in ("train", "val")] == [1, 2]
    assert dict(splits["train"].categories) == dict(splits["val"].categories)


def test_a_voc_file_without_size_takes_the_images_and_is_named(tmp_path: Path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    box = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>20</ymax></bndbox>"
    text = (
        "<annotation><filename>a.jpg</filename><path>/home/somebody/a.jpg</path>"
        "<size><width>0</width><height>0</height></size>"
        f"<object><name>cat</name>{box}</object><object><name>dog</name></object></annotation>"
    )
    (tmp_path / "a.xml").write_text(text)
    (entry,) = read(tmp_path)
    assert (entry.file_name, entry.width, entry.height, len(entry.objects)) == ("a.png", 40, 30, 1)
    assert [p.kind for p in entry.problems] == [Kind.IMAGE_SIZE, Kind.MALFORMED]
    assert "size is 0x0; the image is 40x30" in str(entry.problems[0])


def test_flags_of_objects_are_read(tmp_path: Path):
    annotation = {"image_id": 1, "category_id": 3, "bbox": [1, 1, 5, 5]}
    document = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 9, "height": 9}],
        "categories": [{"id": 3, "name": "cat"}],
        "annotations": [
            {**annotation, "id": 1, "iscrowd": 1},
            {**annotation, "id": 2, "ignore": 1, "attributes": {"occluded": True}},
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(document))
    (entry,) = read(tmp_path / "a.json")
    assert [sorted(thing.flags) for thing in entry.objects] == [["crowd"], ["difficult", "occluded"]]


def test_lvis_is_found_by_its_fields(golden: Path):
    reading = read(golden / "converters" / "lvis_v1.json")
    assert reading.format == "lvis"
    assert next(iter(reading)).file_name == "http://x/val2017/000000000000.jpg"


def test_what_is_no_annotation_file_is_said_in_one_line(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("hello\n")
    for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "gone"):
        with pytest.raises(ValueError, match=str(path)) as caught:
            read(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("packing", ["gzip", "utf-8-sig", "utf-16", "utf-16-le"])
def test_packed_and_marked_files_are_read_as_plain_ones(golden: Path, tmp_path: Path, packing: str):
    text = (golden / "formats" / "coco_v1.json").read_text()
    packed = gzip.compress(text.encode()) if packing == "gzip" else text.encode(packing)
    (tmp_path / "a.json").write_bytes(packed)
    assert find_format(tmp_path / "a.json") == "coco"
    assert boxes(read(tmp_path / "a.json")) == boxes(read(golden / "formats" / "coco_v1.json"))


@pytest.mark.parametrize("packing", ["gzip", "utf-8-sig", "utf-16"])
def test_packed_lines_are_trained_on_as_plain_ones(golden: Path, tmp_path: Path, packing: str):
    source = golden / "converters" / "final_mixed_train_vg.json"
    text = source.read_text()
    (tmp_path / "a.json").write_bytes(gzip.compress(text.encode()) if packing == "gzip" else text.encode(packing))
    packed, plain = load_training(tmp_path / "a.json"), load_training(source)
    assert len(packed) == len(plain) > 0
    assert [packed.entry(n).caption for n in range(len(plain))] == [plain.entry(n).caption for n in range(len(plain))]


@pytest.mark.parametrize("name", SAME_BOXES)
def test_training_packs_every_format(golden: Path, images: Path, name: str):
    options = ReadOptions(images=images)
    packed = load_training(golden / "formats" / name, None, "skip", options=options)
    reading = read(golden / "formats" / name, options)
    assert packed.label_map is not None
    ours = sorted(
        (packed.entry(n).file_name, packed.label_map[int(label)], *box.round().tolist())
        for n in range(len(packed))
        for label, box in zip(packed.entry(n).labels, packed.entry(n).boxes, strict=True)
    )
    counted = {
        (e.file_name, t.name, *map(round, t.box))
        for e in reading
        for t in e.objects
        if not t.flags & flags_left_out(reading.format)
    }
    assert set(ours) == counted and len(ours) > 0
