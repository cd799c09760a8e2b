"""`data check` finds each kind of fault, names file and line, and finds nothing in good data."""

import json
from pathlib import Path

import pytest
from PIL import Image

from groundingdino.data.data_counts import draw, table
from groundingdino.data.formats.record import Kind, ReadOptions
from groundingdino.data.formats.registry import read, read_splits
from groundingdino.data.image_checks import examine, turn_box
from groundingdino.data.validate import CheckOptions, check, check_splits, fix, whole_words


def coco(folder: Path, name: str = "train.json", **changes: object) -> Path:
    """Two good images of different content with a box each, and what `changes` puts in place of the parts."""
    images = []
    for number, color in ((1, "red"), (2, "blue")):
        images.append({"id": number, "file_name": f"{number}.png", "width": 40, "height": 30})
        Image.new("RGB", (40, 30), color).save(folder / f"{number}.png")
    boxes = [{"id": n, "image_id": n, "category_id": n, "bbox": [5, 5, 20, 20]} for n in (1, 2)]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    document = {"images": images, "annotations": boxes, "categories": categories, **changes}
    (folder / name).write_text(json.dumps(document))
    return folder / name


def box(number: int, bbox: list, **fields: object) -> dict:
    return {"id": number, "image_id": 1, "category_id": 1, "bbox": bbox, **fields}


def found(path: Path, **checks: object) -> dict[str, list[str]]:
    """Kind -> its problems as printed."""
    report = check(path, checks=CheckOptions(**checks))  # type: ignore[arg-type]
    assert report.failed == any(kind not in ("image without boxes", "unused category") for kind in report.found)
    return {kind.value: [str(problem) for problem in problems] for kind, problems in report.problems.items()}


def test_good_data_have_no_problem_and_are_counted(tmp_path: Path):
    report = check(coco(tmp_path))
    assert not report.failed and list(report.lines()) == ["no problem found"]
    lines = list(table(report.counts))
    assert lines[1].split()[:3] == ["all", "2", "2"] and "40x30" in lines[1]
    assert [line.split() for line in lines[4:]] == [["cat", "1"], ["dog", "1"]]
    draw(report.counts, tmp_path / "counts.png")
    assert Image.open(tmp_path / "counts.png").size == (1200, 800)


def test_boxes_and_categories(tmp_path: Path):
    boxes = [
        box(1, [5, 5, 20, 20]),
        box(1, [50, 5, 20, 20]),
        box(3, [5, 5, 0, 20]),
        box(4, [30, 5, 20, 20]),
        box(5, [1, 1, 5, 5], category_id=9),
        box(6, [1, 1, 5, 5], image_id=7),
        box(7, [1, "a", 5, 5]),
    ]
    names = ["cat", "dog", "(of any kind)", "Cat"]
    categories = [{"id": n, "name": name} for n, name in enumerate(names, start=1)]
    problems = found(coco(tmp_path, annotations=boxes, categories=categories))
    assert {kind: len(told) for kind, told in problems.items()} == {
        "malformed entry": 2,
        "box outside the image": 1,
        "box past the image's edge": 1,
        "box without area": 1,
        "unknown category": 1,
        "category name without a token": 1,
        "categories with one name": 1,
        "duplicate id": 1,
        "image without boxes": 1,
        "unused category": 3,
    }
    assert (
        "annotations entry 2: box [50, 5, 20, 20] (x, y, width, height) lies outside"
        in problems["box outside the image"][0]
    )
    assert "train.json: images entry 1" in problems["box past the image's edge"][0]
    assert "annotations entry 7: Expected" in problems["malformed entry"][0]


def test_images(tmp_path: Path):
    path = coco(tmp_path)
    document = json.loads(path.read_text())
    first = document["images"][0]
    for number in range(3, 8):
        document["images"].append({**first, "id": number, "file_name": f"{number}.png"})
        document["annotations"].append(box(number, [1, 1, 20, 20], image_id=number))
    document["images"].append({**first, "id": 8, "file_name": "1.png"})
    path.write_text(json.dumps(document))
    (tmp_path / "3.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    Image.new("RGB", (99, 30)).save(tmp_path / "4.png")
    (tmp_path / "5.png").write_bytes((tmp_path / "2.png").read_bytes())
    for number, size in ((6, (40, 30)), (7, (30, 40))):
        turned = Image.new("RGB", size, "green")
        turned.getexif()[0x0112] = 6
        turned.save(tmp_path / f"{number}.png", exif=turned.getexif())
    problems = found(path)
    assert {kind: len(told) for kind, told in problems.items()} == {
        "image broken": 1,
        "wrong image size": 1,
        "boxes drawn on the image before its EXIF rotation": 1,
        "duplicate image": 2,
        "image without boxes": 1,
        "image rotated by EXIF": 1,
    }
    (tmp_path / "2.png").unlink()
    assert "images entry 2: " in found(path)["image missing"][0]
    assert "image missing" not in found(path, open_images=False)


def test_images_of_two_splits_by_name_and_by_content(tmp_path: Path):
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        coco(tmp_path / split)
    problems = found(tmp_path)
    assert len(problems["image in two splits"]) == 2
    assert "valid/1.png (val) is the same image as" in problems["image in two splits"][0]


def mdetr(folder: Path, caption: str, spans: list) -> Path:
    Image.new("RGB", (40, 30)).save(folder / "a.png")
    image = {"id": 0, "file_name": "a.png", "width": 40, "height": 30, "caption": caption}
    boxes = [{"image_id": 0, "bbox": [1, 1, 20, 20], "tokens_positive": [span]} for span in spans]
    (folder / "a.json").write_text(json.dumps({"images": [image], "annotations": boxes}))
    return folder / "a.json"


def test_captions_and_spans(tmp_path: Path):
    assert found(mdetr(tmp_path, "a red cup", [[2, 9], [0, 1]])) == {}
    off = found(mdetr(tmp_path, "a red cup", [[1, 5], [2, 8], [3, 9], [6, 9]]))["span cuts a word"]
    assert len(off) == 3 and "span [1, 5] is ' red'; whole words are [2, 5]" in off[0]
    assert "span outside the caption" in found(mdetr(tmp_path, "a red cup", [[2, 10]]))
    assert "caption over the token limit" in found(mdetr(tmp_path, "cup " * 300, [[0, 3]]))
    assert "caption over the token limit" not in found(mdetr(tmp_path, "photosynthesis " * 60, [[0, 14]]))
    path = mdetr(tmp_path, "a red cup", [[0, 1]])
    path.write_text(path.read_text().replace("[[0, 1]]", "[]"))
    assert "names nothing" in next(iter(found(path))) and "no tokens_positive" in found(path)[Kind.UNNAMED][0]


def test_whole_words_leaves_scripts_without_spaces_alone():
    assert whole_words("一只红色的猫", (2, 4)) == (2, 4)
    assert whole_words("two dogs", (5, 7)) == (4, 8)


def test_long_lists_and_many_objects_are_notes(tmp_path: Path):
    names = [{"id": n, "name": f"thing number {n}"} for n in range(1, 201)]
    path = coco(tmp_path, categories=names, annotations=[box(n, [1, 1, 9, 9]) for n in range(12)])
    report = check(path, checks=CheckOptions(max_objects=10))
    assert not report.failed
    assert report.found[Kind.LONG_PROMPT] == 1 and report.found[Kind.MANY_OBJECTS] == 1
    assert "... and" in "\n".join(report.lines(shown=1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_turn_with_their_image(tmp_path: Path, orientation: int):
    stored = Image.new("L", (40, 30))
    stored.paste(255, (5, 3, 15, 25))
    exif = stored.getexif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    from groundingdino.inputs.images import load_image

    upright = load_image(tmp_path / "a.png")
    assert turn_box((5, 3, 15, 25), (40, 30), orientation) == upright.convert("L").getbbox()
    assert examine(tmp_path / "a.png").size == upright.size


def test_a_corrected_copy_has_no_problem_and_says_what_changed(tmp_path: Path):
    path = coco(tmp_path, annotations=[box(1, [30, 5, 20, 20]), box(2, [5, 5, 0, 9]), box(3, [1, 1, 9, 9], image_id=2)])
    document = json.loads(path.read_text())
    document["images"].append({**document["images"][0], "id": 3, "file_name": "gone.png"})
    turned = Image.new("RGB", (50, 20))
    turned.getexif()[0x0112] = 6
    turned.save(tmp_path / "4.png", exif=turned.getexif())
    document["images"].append({"id": 4, "file_name": "4.png", "width": 50, "height": 20})
    document["annotations"].append(box(4, [1, 2, 30, 10], image_id=4))
    path.write_text(json.dumps(document))
    splits = read_splits(path)
    _, facts = check_splits(splits, CheckOptions())
    written, changes = fix(splits, facts, tmp_path / "fixed.json")
    assert written.counts == {"all": 3}
    assert changes == {
        "box without area: corrected or left out": 1,
        "box past the image's edge: cut": 1,
        "image missing or broken: entry left out": 1,
        "boxes drawn on the image before its EXIF rotation: turned": 1,
    }
    again = check(tmp_path / "fixed.json", ReadOptions(images=tmp_path))
    assert not again.failed
    boxes = {entry.file_name: entry.objects[0].box for entry in read(tmp_path / "fixed.json")}
    assert boxes["1.png"] == (30, 5, 40, 25) and boxes["4.png"] == (8, 1, 18, 31)


def test_captions_are_corrected_too(tmp_path: Path):
    splits = read_splits(mdetr(tmp_path, "a red cup", [[2, 8]]))
    _, changes = fix(splits, {}, tmp_path / "fixed.jsonl")
    assert changes == {"span cuts a word: widened to whole words": 1}
    (entry,) = read(tmp_path / "fixed.jsonl")
    assert entry.regions == (((2, 9),),) and entry.objects[0].name == "red cup"
